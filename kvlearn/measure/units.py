"""Numbers with their units: KiB, MiB, GiB are powers of two; kB, MB, GB powers of ten."""

from kvlearn import validate

KIB, MIB, GIB, TIB = (2 ** (10 * power) for power in range(1, 5))
KB, MB, GB, TB = (10 ** (3 * power) for power in range(1, 5))


def format_bytes(n_bytes: float) -> str:
    """Bytes in powers of two, to two decimals: ``format_bytes(15.75 * 2**30)`` is ``"15.75 GiB"``."""
    return _scaled(validate.finite("n_bytes", n_bytes), 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def format_bytes_decimal(n_bytes: float) -> str:
    """Bytes in powers of ten, to two decimals, as disks and bandwidths are sold: ``"16.91 GB"``."""
    return _scaled(validate.finite("n_bytes", n_bytes), 1000, ("B", "kB", "MB", "GB", "TB", "PB"))


def format_rate(per_second: float, of: str = "B") -> str:
    """A rate in powers of ten: ``format_rate(35.2e9)`` is ``"35.2 GB/s"``, with ``of="FLOP"`` GFLOP/s."""
    validate.finite("per_second", per_second)
    validate.instance("of", of, str)
    return _scaled(per_second, 1000, tuple(prefix + of + "/s" for prefix in ("", "k", "M", "G", "T", "P")))


def format_seconds(seconds: float) -> str:
    """A time in s, ms, µs or ns, to three significant digits: ``"1.24 ms"``."""
    validate.finite("seconds", seconds)
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if float(f"{abs(seconds) / size:.3g}") >= 1:
            return f"{_plain(seconds / size)} {unit}"
    return f"{_plain(seconds / 1e-9)} ns"


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    power = 0
    # Asks the rounded value, so that 1023.999 KiB reads 1 MiB and not 1024 KiB.
    while round(abs(value) / base**power, 2) >= base and power < len(units) - 1:
        power += 1
    return f"{value / base**power:.2f}".rstrip("0").rstrip(".") + f" {units[power]}"


def _plain(value: float) -> str:
    """Three significant digits without an exponent."""
    return f"{float(f'{value:.3g}'):.10g}"
