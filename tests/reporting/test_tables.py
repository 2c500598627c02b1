"""The report's tables: intervals, LaTeX, pages of runs, and what is counted on the modules."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFont

from afm_pipe.params.file import load_params
from afm_pipe.reporting import printing
from afm_pipe.reporting.counts import xl2_work
from afm_pipe.reporting.pictures import draw_sheet
from afm_pipe.reporting.table import Column, Table
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from tests.reporting.report_inputs import (
    Page,
    built,
    make_params,
    write,
    write_inputs,
)


def test_intervals_of_measuring_are_shown_and_rank_nothing(project: Path) -> None:
    params = make_params(a={}, b={"lr": 5.0e-4}, c={"lr": 6.0e-4}, d={"lr": 7.0e-4})
    write_inputs(params)
    values = {"a": (8.0, [7.0, 9.0]), "b": (7.0, [6.6, 7.4]), "c": (20.0, [19.0, 21.0]), "d": (6.0, None)}
    for name, (value, interval) in values.items():
        stored = json.loads(paths.metrics(name).read_text()) | {"fd_classifier_5k": value}
        write(paths.metrics(name), stored | ({"intervals": {"fd_classifier_5k": interval}} if interval else {}))
    page = built(params)
    cells = [row[2] for row in page.rows["table-runs tbody"]]
    assert cells == ["8.00 [7.00, 9.00]", "7.00 [6.60, 7.40]", "20.0 [19.0, 21.0]", "6.00"]
    for name in ("runs", "paper_one_step"):
        for kind in ("md", "tex"):
            assert "Nothing is ranked by it" in (paths.RENDERED / f"{name}.{kind}").read_text()
    assert "run d, one seed, the lowest; one seed ranks nothing" in page.text
    with (paths.RENDERED / "runs.csv").open(newline="") as file:
        row = list(csv.DictReader(file))[1]
    assert (row["fd_classifier_5k_low"], row["fd_classifier_5k_high"]) == ("6.6", "7.4")


def test_the_note_says_where_no_row_has_an_interval(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    built(params)
    assert "measured without an interval: nothing is ranked" in (paths.RENDERED / "runs.md").read_text()


def test_ratios_to_held_out_images_stand_in_the_summary_and_in_the_table_with_their_intervals(project: Path) -> None:
    params = make_params(a={}, b={"lr": 5.0e-4})
    write_inputs(params)
    for name, value in {"a": 9.0, "b": 4.0}.items():
        measured = {"ratio_fd_classifier_500": value, "difference_kid_classifier_500": 0.125, "fd_classifier_5k": value}
        intervals = {"ratio_fd_classifier_500": [value - 1, value + 2], "difference_kid_classifier_500": [0.1, 0.15]}
        stored = json.loads(paths.metrics(name).read_text())
        write(paths.metrics(name), stored | measured | {"intervals": intervals})
    summary = json.loads((paths.REFERENCE / "summary.json").read_text())
    held_out = {"images": 500, "in_shares": 500, "manifest": "ab", "copies": 0.0, "fd_classifier_500": [0.9, 0.5, 1.3]}
    write(paths.REFERENCE / "summary.json", summary | {"held_out": held_out})
    page = built(params)
    assert "FD ratio-500 (classifier), run b: 1 is real; 95 % interval of measuring 3.00 to 6.00" in page.text
    titles = page.rows["table-runs thead"][0]
    row = dict(zip(titles, page.rows["table-runs tbody"][1], strict=True))
    assert row["FD ratio-500 (classifier)"] == "4.00 [3.00, 6.00]"
    assert row["KID difference-500 (classifier)"] == "0.125 [0.100, 0.150]"
    assert "which have FD-500 (classifier) 0.900 [0.500, 1.30]." in page.text
    write(paths.REFERENCE / "summary.json", summary | {"held_out": {"images": 3, "in_shares": 3, "manifest": "ab"}})
    assert "Too few real images are held out to compare samples with them." in built(params).text


@pytest.mark.parametrize("intervals", [[1, 2], {"fd_classifier_5k": 3.0}, {"fd_classifier_5k": ["x", 1]}])
def test_damaged_intervals_are_a_clear_error(project: Path, intervals: Any) -> None:
    params = make_params()
    write_inputs(params)
    write(paths.metrics("t4"), json.loads(paths.metrics("t4").read_text()) | {"intervals": intervals})
    with pytest.raises(UserError, match="with a wrong intervals"):
        built(params)


def test_a_wide_table_has_main_columns_and_its_caption_ends_in_small_print() -> None:
    columns = tuple(Column(key, key.upper()) for key in "abcdefg")
    wide = Table("t", "What it is. From v1.2 files. More.", columns, (), note="In brackets: one thing. And another.")
    assert wide.later == (5, 6)
    assert wide._replace(first=("a", "g")).later == (1, 2, 3, 4, 5)
    assert wide._replace(columns=columns[:6]).later == ()
    assert wide.headline == "What it is. In brackets: one thing."
    assert wide.small_print == "From v1.2 files. More. And another."


def test_titles_of_small_pictures_do_not_overlap(project: Path) -> None:
    small = Image.new("RGB", (20, 20))
    for title in ("a", "one-step-larger-longer"):
        draw_sheet([(title, small), (title, small)], Path(f"{title}.png"))
    narrow, wide = (Image.open(f"{title}.png").width for title in ("a", "one-step-larger-longer"))
    assert narrow == 16 + 2 * (20 + 16)
    assert wide >= 2 * ImageFont.load_default(16).getlength("one-step-larger-longer") + 3 * 16


def test_latex_is_escaped_has_rules_and_says_the_sample_count(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    built(params)
    text = (paths.RENDERED / "paper_one_step.tex").read_text()
    for part in ("\\toprule", "\\midrule", "\\bottomrule", "\\label{tab:paper-one-step}", "5,000 samples"):
        assert text.count(part) >= 1
    assert text.count("{") == text.count("}")
    assert text.index("From this repository") < text.index("From the paper")
    kinds = text.split("\\begin{tabular}{")[1].split("}")[0]
    rows = [line for line in text.splitlines() if line.endswith("\\\\") and "multicolumn" not in line]
    assert {line.count(" & ") for line in rows} == {len(kinds) - 1}
    assert printing.escape_latex("a_b & 5 % {x} \\ #1 $2 ~ ^ λ ± →") == (
        r"a\_b \& 5 \% \{x\} \textbackslash{} \#1 \$2 \textasciitilde{} \textasciicircum{} "
        r"$\lambda$ $\pm$ $\rightarrow$"
    )


def test_every_table_is_written_in_all_three_ways(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    page = built(params)
    names = {str(each["id"]).removeprefix("table-") for each in page.all("table")}
    assert {"runs", "costs", "paper_one_step", "paper_architectures", "published_transport_decay"} <= names
    for name in names:
        for kind in ("md", "csv", "tex"):
            assert (paths.RENDERED / f"{name}.{kind}").stat().st_size > 20


def test_a_run_has_a_page_with_its_settings_protocol_and_events(project: Path) -> None:
    phases = [{"until_epoch": 6}, {"until_epoch": 8, "reload_ema": "epoch", "reload_discriminator": 4}]
    params = make_params(a={"phases": phases}, b={})
    write_inputs(params)
    event = {"update": 12, "images": 768, "kind": "stall", "text": "D reloaded <by hand>"}
    paths.events("a").parent.mkdir(exist_ok=True)
    paths.events("a").write_text(json.dumps(event) + "\n")
    index = built(params)
    page = Page((paths.REPORT / "runs" / "a.html").read_text())
    for words in ("reload_discriminator: 4.0", "stall: D reloaded <by hand> (update 12)", "a phase ends: epoch 6"):
        assert words in page.text
    assert "D reloaded from epoch 4" in page.text
    assert "1000" in page.text  # the seed, of the protocol
    links = {str(link["href"]) for link in page.all("a")}
    assert {"../index.html", "b.html", "../../../results/metrics/a.json"} <= links
    for link in page.all("a"):
        if not str(link["href"]).startswith("#"):
            assert (paths.REPORT / "runs" / str(link["href"])).is_file()
    marks = [each for each in index.all("path") if "mark" in str(each.get("class"))]
    assert any("intervention" in str(each["class"]) for each in marks)


def test_damaged_events_name_their_line(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    paths.events("t4").parent.mkdir(exist_ok=True)
    paths.events("t4").write_text("{}\n")
    with pytest.raises(UserError, match="t4.jsonl with 1 damaged line, the first is line 1"):
        built(params)


def test_counted_parameters_equal_the_published_ones(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    rows = built(params).rows["table-paper_architectures tbody"]
    assert len(rows) == 12
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        for place in (4, 5):
            assert abs(float(ours[place]) - float(theirs[place])) < 1.0


def test_the_work_of_a_run_is_counted_on_its_steps(project: Path) -> None:
    params = make_params(a={}, b={"repeats": 2})
    write_inputs(params)
    shape = {"size": "t4", "channels": 4, "latent_size": 8, "num_classes": 10}
    for name, repeats in {"a": 1, "b": 2}.items():
        described = {"generator_parameters": 1, "discriminator_parameters": 1, "model": shape | {"repeats": repeats}}
        write(paths.model(name) / "config.json", described)
    rows = built(params).rows["table-paper_compute tbody"]
    assert ["AFMpaper", "14.5", "2", "2", "4.5", "6"] in rows
    of_xl2, one, two = (float(row[1]) for row in rows[:3])
    assert of_xl2 == pytest.approx(14.5, rel=0.03)
    assert 14 < one < 19
    assert two < 0.75 * one  # a generator of twice the work for the same discriminator


def test_xl2_costs_the_papers_units() -> None:
    """Paper Table 12: 14.5 forward passes of G an update of D and G."""
    work = xl2_work(load_params(Path(__file__).parents[2] / "params.yaml").train)
    assert work.units == pytest.approx(14.5, rel=0.03)
    assert sum(work.parts) == work.flops
    # G forward and backward, D forward and backward, as the paper adds them up.
    assert [part / work.forward_flops for part in work.parts] == pytest.approx([2, 2, 4.5, 6], rel=0.03)
