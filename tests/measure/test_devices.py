"""The table of real devices."""

from kvlearn.measure import DEVICES, device_table
from kvlearn.measure.budget import GPUS


def test_every_device_has_a_source_and_sizes_in_the_right_units() -> None:
    for name, device in DEVICES.items():
        assert device.name == name
        assert device.source.split(",")[0] in ("NVIDIA", "AMD", "Apple")
        assert 8e9 <= device.memory <= 300e9
        assert 1e11 < device.bandwidth < 1e13
        assert 1e13 <= device.peak < 2e15
    assert set(GPUS) <= set(DEVICES)


def test_dense_peaks_are_half_of_those_with_sparsity() -> None:
    assert DEVICES["H100"].peak == DEVICES["H200"].peak == 1979e12 / 2
    assert round(DEVICES["H100"].roofline.knee) == 295
    assert round(DEVICES["H200"].roofline.knee) == 206


def test_the_table_has_a_row_per_device() -> None:
    rows = device_table().rows
    assert [row["device"] for row in rows] == list(DEVICES)
    assert rows[0]["knee, FLOP per byte"] == "70"
