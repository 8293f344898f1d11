"""The pictures of "Your model" show what they were given."""

from kvlearn.plots.workbench import largest_batches


def test_the_largest_batches_are_lines_of_predictions_with_markers_of_measurements() -> None:
    points = [(1024, 90, 88), (2048, 45, 44), (4096, 22, 22)]
    picture = largest_batches({"ours": points, "yours": [(1024, 9, 9), (4096, 2, 2)]})
    (axes,) = picture.figure.axes
    predicted, measured, *_ = axes.get_lines()
    assert [tuple(point) for point in predicted.get_xydata()] == [(n, p) for n, p, _ in points]
    assert [tuple(point) for point in measured.get_xydata()] == [(n, m) for n, _, m in points]
    assert measured.get_linestyle() == "None"
    assert measured.get_marker() not in ("", "None")
    assert axes.get_xlabel() == "context, tokens"
    assert "ours: 88 at 1,024 tokens, 22 at 4,096" in picture.alt
