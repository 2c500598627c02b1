"""Heat maps and error bars, read back as XML."""

import math
from xml.etree import ElementTree

from afm_pipe.reporting.plots import Point, error_bars, heat_map


def grid() -> ElementTree.Element:
    values = [[8.0, 2.0, None], [4.0, 16.0, math.nan]]
    texts = [["8", "2", "diverged"], ["4", "16 <b>", "–"]]
    return ElementTree.fromstring(heat_map(["0.1", "0.25"], ["0", "0.1", "0.2"], values, texts, "FD & co"))


def test_the_better_a_cell_the_fuller_and_the_best_is_framed() -> None:
    cells = list(grid().iter("rect"))
    fullness = [float(each.get("fill-opacity", "nan")) for each in cells]
    assert fullness[1] > fullness[3] > fullness[0] > fullness[4]
    assert abs((fullness[1] - fullness[3]) - (fullness[3] - fullness[0])) < 0.01  # by ratio: 2, 4, 8
    assert [index for index, each in enumerate(cells) if "best" in each.get("class", "")] == [1]
    assert [index for index, each in enumerate(cells) if "none" in each.get("class", "")] == [2, 5]


def test_a_grid_says_its_numbers_to_who_cannot_see_it() -> None:
    assert grid().get("role") == "img"
    assert grid().get("aria-label") == (
        "FD & co. Lower is better. 0.1: 8 at 0, 2 at 0.1, diverged at 0.2; 0.25: 4 at 0, 16 <b> at 0.1, – at 0.2"
    )


def centres(svg: ElementTree.Element) -> list[float]:
    return [float(each.get("cx", "nan")) for each in svg.iter("circle")]


def test_a_logarithmic_axis_spaces_by_ratio_and_has_a_place_for_zero() -> None:
    points = [Point(x, 1.0 + x, 0.5, 2.0) for x in (0.0, 0.01, 0.1, 1.0)]
    x = centres(ElementTree.fromstring(error_bars(points, "t", log_x=True)))
    assert abs((x[3] - x[2]) - (x[2] - x[1])) < 0.2
    assert x[0] < x[1]


def test_an_interval_spans_its_ends_and_a_point_without_one_is_hollow() -> None:
    points = [Point("a", 2.0, 1.0, 4.0), Point("b", 3.0), Point("c", None)]
    svg = ElementTree.fromstring(error_bars(points, "t"))
    bars = [each.get("d", "") for each in svg.iter("path")]
    assert len(bars) == 1
    low, high = (float(part) for part in bars[0].split("M")[1].split(" ")[1].split("V"))
    middle = float(next(svg.iter("circle")).get("cy", "nan"))
    assert abs((low - middle) / (middle - high) - 1) < 0.02  # by ratio: 1, 2, 4
    assert ["hollow" in each.get("class", "") for each in svg.iter("circle")] == [False, True]
    assert (svg.get("aria-label") or "").endswith("a: 2.00 [1.00, 4.00]; b: 3.00; c: –")


def test_long_labels_break_into_lines_that_do_not_meet() -> None:
    names = ["as in the paper", "penalties on a sixteenth of the batch", "penalties every 4th update", "all three"]
    svg = ElementTree.fromstring(error_bars([Point(name, 1.0 + len(name)) for name in names], "t"))
    room = (560 - 84) / len(names)
    labels = [each for each in svg.iter("text") if each.get("text-anchor") == "middle"]
    assert " ".join(each.text or "" for each in labels) == " ".join(names)
    assert max(len(each.text or "") for each in labels) * 6.4 <= room
    lowest = max(float(each.get("y", "0")) for each in labels)
    assert float((svg.get("viewBox") or "").split()[3]) > lowest + 13  # room for the axis's title below
    heads = ElementTree.fromstring(heat_map(["R"], names, [[1, 2, 3, 4]], [["1", "2", "3", "4"]], "t"))
    above = [each for each in heads.iter("text") if each.get("class") is None and each.text != "R"]
    assert " ".join(each.text or "" for each in above) == " ".join(names)
    assert all(float(each.get("y", "nan")) < float(next(heads.iter("rect")).get("y", "nan")) for each in above)


def test_a_long_title_of_rows_has_room() -> None:
    svg = ElementTree.fromstring(heat_map(["on"], ["1"], [[1]], [["1"]], "t", "Gradient normalization of G"))
    title = next(each for each in svg.iter("text") if each.text == "Gradient normalization of G")
    assert float(title.get("x", "nan")) >= 6.4 * len("Gradient normalization of G")
    narrow = ElementTree.fromstring(heat_map(["on"], ["1"], [[1]], [["1"]], "A title wider than its only column"))
    assert float((narrow.get("viewBox") or "").split()[2]) > 7.5 * len("A title wider than its only column")


def test_series_of_error_bars_have_their_color_and_name() -> None:
    points = [Point(1, 0.5, 0.4, 0.6, series=0), Point(64, 0.25, series=1)]
    drawn = error_bars(points, "FID over NFE", "NFE", log_x=True, legend=["flow matching", "adversarial flow"])
    assert "flow matching, 1: 0.500 [0.400, 0.600]; adversarial flow, 64: 0.250" in drawn
    assert "stroke:var(--run-0)" in drawn
    assert "stroke:var(--run-1)" in drawn  # hollow
    assert ">adversarial flow</text>" in drawn
