"""The report, built from fabricated inputs and read back as a browser's parser would."""

import csv
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from afm_pipe import paths
from afm_pipe.errors import UserError
from afm_pipe.params import Params
from afm_pipe.params_file import load_params
from afm_pipe.reporting import curves, printing, tables, titles
from afm_pipe.reporting.counts import xl2_work
from afm_pipe.reporting.page import write_report
from afm_pipe.reporting.tables import setting_text

COMMITTED = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text())
RUNS = {"t4": {"seed": 0}, "t4-no-transport": {"transport": 0.0}}
CLASSES = [str(digit) for digit in range(9)] + ['"><b>&nine']  # a class name is a folder's name: anything
COLUMNS = ["update", "images", "epoch", "lr", "transport", "d_adversarial", "r1", "r2", "centring", "g_adversarial"]
COLUMNS += ["g_transport", "logit_gap", "d_accuracy", "move_rms", "d_grad_norm", "g_grad_norm"]


def make_params(**runs: dict[str, Any]) -> Params:
    own = {"runs": runs or RUNS, "guided": {}, "imported": {}, "tables": {}}
    return Params.model_validate(COMMITTED | own)


def write_inputs(params: Params, rows: int = 40) -> None:
    """Write, under the working directory, every file the report reads."""
    for number, name in enumerate(params.runs):
        write(
            paths.metrics(name),
            {
                "fd_classifier_5k": 8.1234 + 300 * number,
                "kid_classifier_5k": 0.012345,
                "class_accuracy": 0.978 - 0.5 * number,
                "within_class_variance": 0.85,
                "copies": 0.0,
                "nearest_distance_ratio": 1.1,
                "protocol": {"samples": 5000, "seed": 1000, "features": {"classifier": "ab" * 32}, "device": "cpu"},
            },
        )
        write(
            paths.costs(name),
            {"machine": "2-core test machine", "device": "cpu", "threads": 2, "seconds": 155.1, "updates": 1250}
            | {"images": 80000, "images_per_second": 516.0, "updates_per_second": 8.06, "data_wait_share": 0.004}
            | {"checkpoint_share": 0.004, "peak_memory_gib": 0.9},
        )
        write(
            paths.model(name) / "config.json",
            {"generator_parameters": 1_234_567, "discriminator_parameters": 1_200_000},
        )
        write_curve(paths.curves(name), number, rows)
        write_picture(paths.samples(name) / "grid.png", number)
        write_picture(paths.samples(name) / "nearest.png", number + 10)
        write_picture(paths.samples(name) / "interpolation.png", number + 20)
    write(
        paths.REFERENCE / "summary.json",
        {"classifier_accuracy": 0.97, "fd_classifier_reconstruction": 3.14, "kid_classifier_reconstruction": 0.004}
        | {"images": 5000, "classes": CLASSES},
    )
    write(paths.AUTOENCODER / "training.json", {"reconstruction_mse": 0.0085})
    write_picture(paths.REFERENCE / "real.png", 20)
    write_picture(paths.REFERENCE / "reconstructed.png", 21)


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_curve(path: Path, seed: int, rows: int, broken: int | None = None) -> None:
    noise = np.random.default_rng(seed).random((rows, len(COLUMNS)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in range(rows):
            values = dict(zip(COLUMNS, noise[row], strict=True))
            values |= {"update": row + 1, "images": 64 * (row + 1), "lr": 1e-3, "transport": 0.2 / (row + 1)}
            writer.writerow("nan" if row == broken else values[name] for name in COLUMNS)


def write_picture(path: Path, seed: int, side: int = 48) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


class Page(HTMLParser):
    """What a test asks of a page: elements with their attributes, the text, and the rows of each table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.text = ""
        self._table = self._part = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self._table = dict(attrs)["id"] or ""
        if tag in ("thead", "tbody", "tfoot"):
            self._part = f"{self._table} {tag}"
        if tag == "tr":
            self.rows.setdefault(self._part, []).append([])
        if tag in ("td", "th"):
            self.rows[self._part][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._part = ""

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._part and self.rows.get(self._part) and self.rows[self._part][-1]:
            self.rows[self._part][-1][-1] += data.strip()

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def built(params: Params) -> Page:
    write_report(params, paths.REPORTS)
    return Page((paths.REPORTS / "index.html").read_text(encoding="utf-8"))


def test_tables_list_exactly_the_runs_params_name(project: Path) -> None:
    write_inputs(make_params(a={}, removed={}, b={"lr": 5.0e-4}))
    page = built(make_params(b={"lr": 5.0e-4}, a={}))
    assert [row[0] for row in page.rows["table-runs tbody"]] == ["b", "a"]
    assert [row[0] for row in page.rows["table-costs tbody"]] == ["b", "a"]
    assert "removed" not in page.text
    with (paths.REPORTS / "runs.csv").open(newline="") as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["b", "a"]


def test_numbers_are_printed_short_and_stored_in_full(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    page = built(params)
    titles_shown = page.rows["table-runs thead"][0]
    row = dict(zip(titles_shown, page.rows["table-runs tbody"][0], strict=True))
    assert row["FD-5k (classifier)"] == "8.12"
    assert row["Right class"] == "97.8 %"
    assert row["Training time"] == "2.58 min"
    with (paths.REPORTS / "runs.csv").open(newline="") as file:
        assert float(next(csv.DictReader(file))["fd_classifier_5k"]) == 8.1234
    markdown = (paths.REPORTS / "runs.md").read_text()
    assert "| t4 | 8.12 |" in markdown


def test_settings_in_which_runs_differ_stand_under_their_titles(project: Path) -> None:
    params = make_params(a={}, b={"lr": 5.0e-4, "penalty": {"weight": 0.5}})
    write_inputs(params)
    page = built(params)
    first, second = (
        dict(zip(page.rows["table-runs thead"][0], row, strict=True)) for row in page.rows["table-runs tbody"]
    )
    assert (first["Learning rate"], first["Penalty weight"]) == ("0.001", "0.25")
    assert (second["Learning rate"], second["Penalty weight"]) == ("0.0005", "0.5")


def test_each_metric_links_to_the_file_it_was_read_from(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    links = {link["title"]: link["href"] for link in built(params).all("a") if "title" in link}
    assert links["metrics/t4.json: fd_classifier_5k = 8.1234"] == "../metrics/t4.json"
    assert links["reference/summary.json: fd_classifier_reconstruction = 3.14"] == "../reference/summary.json"
    for href in links.values():
        assert (paths.REPORTS / str(href)).is_file()


def test_internal_links_have_targets_and_ids_are_unique(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    page = built(params)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    local = {str(link["href"])[1:] for link in page.all("a") if str(link["href"]).startswith("#")}
    assert local <= set(ids)
    files = [str(link["href"]) for link in page.all("a") if not str(link["href"]).startswith(("#", "../"))]
    assert files
    assert all((paths.REPORTS / href).is_file() for href in files)


def test_page_fetches_nothing_and_describes_every_picture(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    page = built(params)
    assert "http://" not in page.text
    assert "https://" not in page.text
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "base")
        assert not (attributes.get("src") or "").strip() or str(attributes["src"]).startswith("data:")
        if tag == "link":
            assert str(attributes["href"]).startswith("data:")
        if tag == "img":
            assert len(attributes["alt"] or "") > 20
        if tag == "svg" and attributes.get("role") == "img":
            assert "over images seen" in (attributes["aria-label"] or "")
    assert len(page.all("img")) == 2 + 3 * len(params.runs)
    assert "url(" not in (paths.REPORTS / "index.html").read_text().split("</style>")[0]


def test_summary_names_the_best_run_the_floor_and_the_scale(project: Path) -> None:
    params = make_params(worse={"lr": 5.0e-4}, better={})
    write_inputs(params)
    write(paths.metrics("worse"), json.loads(paths.metrics("worse").read_text()) | {"fd_classifier_5k": 44.0})
    write(paths.metrics("better"), json.loads(paths.metrics("better").read_text()) | {"fd_classifier_5k": 7.7})
    text = built(params).text
    assert "7.70" in text
    assert "run better, the lowest (without intervals: no ranking); reconstructed real images have 3.14" in text
    assert "not comparable with the paper's ImageNet numbers: 5,000 training images instead of 1,281,167" in text


def test_class_names_are_text_never_markup(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    page = built(params)
    assert "b" not in {tag for tag, _ in page.elements}
    assert any('"><b>&nine' in str(image["alt"]) for image in page.all("img"))


def test_published_numbers_stand_in_their_own_tables_only(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    page = built(params)
    one_step = page.rows["table-paper_one_step tbody"]
    assert ["AFM XL/2paper", "1", "673", "125", "cg+da", "2.38", "", ""] in [[*row[:6], "", ""] for row in one_step]
    assert one_step[0][:6] == ["t4ours", "1", "1.23", "8", "none", titles.MISSING]  # the paper's FID was not measured
    assert one_step[0][6] == "8.12"
    assert page.rows["table-published_transport_penalty tbody"][1][3] == "53.90 ± 1"
    assert page.rows["table-published_transport_decay tbody"][1] == ["cosine 0.2 → 0.01", "8.51"]
    assert not any("AFM" in cell for row in page.rows["table-runs tbody"] for cell in row)


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("metrics/t4.json", "evaluate@t4"),
        ("curves/t4.csv", "train@t4"),
        ("costs/t4.json", "train@t4"),
        ("samples/t4/grid.png", "sample@t4"),
        ("reference/summary.json", "reference"),
        ("models/autoencoder/training.json", "autoencoder"),
    ],
)
def test_missing_input_names_the_file_and_its_stage(project: Path, path: str, stage: str) -> None:
    params = make_params()
    write_inputs(params)
    Path(path).unlink()
    with pytest.raises(UserError, match=f"{path}.*dvc repro {stage}"):
        write_report(params, paths.REPORTS)
    assert not paths.REPORTS.exists()


@pytest.mark.parametrize(
    ("path", "content", "words"),
    [
        ("costs/t4.json", b'{"machine": "x"}', "costs/t4.json with a wrong device"),
        ("curves/t4.csv", b"update,images\n1,many\n", "'many' in curves/t4.csv, line 2, column images"),
        ("curves/t4.csv", b"update,images\n", "no rows"),
        ("metrics/t4.json", b'{"fid_5k": 3.0}', "without numbers or their protocol"),
        ("samples/t4/grid.png", b"\x89PNG\r\n\x1a\n cut short", "no whole PNG"),
    ],
)
def test_damaged_input_is_a_clear_error(project: Path, path: str, content: bytes, words: str) -> None:
    params = make_params()
    write_inputs(params)
    Path(path).write_bytes(content)
    with pytest.raises(UserError, match=words):
        write_report(params, paths.REPORTS)


def test_same_inputs_give_the_same_bytes(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    for folder in ("first", "second"):
        write_report(params, Path(folder))
    names, again = (
        sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
        for folder in ("first", "second")
    )
    assert names == again
    assert "index.html" in names
    for name in names:
        assert Path("first", name).read_bytes() == Path("second", name).read_bytes()


def test_heavy_pictures_are_made_smaller(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    for name in params.runs:
        write_picture(paths.samples(name) / "grid.png", 0, side=1300)  # noise: 5 MB each as PNG
    built(params)
    assert (paths.REPORTS / "index.html").stat().st_size < 10 * 2**20


def test_curve_breaks_where_a_run_diverged_and_missing_metrics_are_dashes(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    write_curve(paths.curves("t4"), 0, 40, broken=None)
    with_gap = Path("gap.csv")
    write_curve(with_gap, 0, 40, broken=20)
    rows = with_gap.read_text().splitlines()
    rows[21] = rows[21].replace("nan", "1300", 2).replace("1300", "21", 1)  # update and images stay known
    paths.curves("t4").write_text("\n".join(rows) + "\n")
    stored = json.loads(paths.metrics("t4").read_text())
    write(paths.metrics("t4"), stored | {"fd_classifier_5k": None})
    page = built(params)
    assert page.rows["table-runs tbody"][0][1] == titles.MISSING
    gap = next(svg for svg in page.all("path") if "--run-0" in str(svg["style"]) and len(str(svg["d"])) > 100)
    assert str(gap["d"]).count("M") == 2
    assert "nan" not in str(gap["d"])


def test_long_curves_are_averaged_to_the_mean_of_their_bins() -> None:
    curve = {"images": [float(i) for i in range(1000)], "lr": [float(i % 2) for i in range(1000)]}
    images, values = curves._line(curve, "lr")
    assert len(images) == curves.MAX_POINTS
    assert values == pytest.approx(0.5, abs=0.1)
    assert images[0] == pytest.approx(2.5, abs=0.6)


def test_settings_shown_are_those_in_which_runs_differ() -> None:
    params = make_params(a={}, b={"transport": 0.2, "penalty": {"weight": 0.5}})
    found = tables.differing_settings(list(params.runs.values()))
    assert list(found) == ["penalty.weight", "transport"]
    assert tables.setting_text("transport", found["transport"][1]) == "0.2 constant"
    assert tables.differing_settings([params.runs["a"]]) == {}


@pytest.mark.parametrize(
    ("value", "text"),
    [(8.1, "8.10"), (9.999, "10.0"), (1250, "1,250"), (1_281_167, "1,281,167"), (328.7, "329"), (0.0, "0")]
    + [(0.012345, "0.0123"), (1.23e-5, "1.23e-5"), (-0.00123, "-0.00123"), (None, "–"), (math.inf, "not finite")],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert titles.number(value) == text


def test_only_inception_distances_are_called_fid() -> None:
    assert titles.metric("fid_5k").title == "FID-5k"
    assert titles.metric("fid").title == "FID"
    assert titles.metric("kid_clean_1234").title == "KID-1234 (clean)"
    for key in ("fd_classifier_5k", "kid_classifier_5k", "fd_dinov2", "kid_dinov2"):
        assert "FID" not in titles.metric(key).title
        assert "KID" not in titles.metric(key).title


def test_a_phase_says_all_that_is_done_in_it() -> None:
    phase = {"until_epoch": 10.0, "lr": 3e-4, "guidance": {"scale": 0.02}, "augment": {"probability": 0.4}}
    later = {"until_epoch": 12.0, "reload_ema": "epoch", "reload_discriminator": 8.0, "gradient_clip": 5.0}
    found = setting_text("phases", [phase, later])
    expected = "10 at lr 0.0003, guided by 0.02, augmented, then 12, clipped at 5, EMA reload, D reload from 8"
    assert found == expected


def test_intervals_are_shown_and_overlapping_rows_are_not_told_apart(project: Path) -> None:
    params = make_params(a={}, b={"lr": 5.0e-4}, c={"lr": 6.0e-4}, d={"lr": 7.0e-4})
    write_inputs(params)
    values = {"a": (8.0, [7.0, 9.0]), "b": (7.0, [6.6, 7.4]), "c": (20.0, [19.0, 21.0]), "d": (6.0, None)}
    for name, (value, interval) in values.items():
        stored = json.loads(paths.metrics(name).read_text()) | {"fd_classifier_5k": value}
        write(paths.metrics(name), stored | ({"intervals": {"fd_classifier_5k": interval}} if interval else {}))
    page = built(params)
    cells = [row[1] for row in page.rows["table-runs tbody"]]
    assert cells == ["8.00 [7.00, 9.00]not told apart", "7.00 [6.60, 7.40]best", "20.0 [19.0, 21.0]", "6.00"]
    assert "rows whose interval overlaps the best's are not told apart from it" in page.text
    with (paths.REPORTS / "runs.csv").open(newline="") as file:
        row = list(csv.DictReader(file))[1]
    assert (row["fd_classifier_5k_low"], row["fd_classifier_5k_high"]) == ("6.6", "7.4")


def test_rows_without_intervals_are_not_ranked_and_the_caption_says_so(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    page = built(params)
    assert not any(each.get("class", "").startswith("mark") for each in page.all("abbr"))  # type: ignore[union-attr]
    assert "No row carries an interval" in (paths.REPORTS / "runs.md").read_text()


def test_the_summary_says_what_the_lowest_is_not_told_apart_from(project: Path) -> None:
    params = make_params(a={}, b={"lr": 5.0e-4})
    write_inputs(params)
    for name, value in {"a": 8.0, "b": 7.5}.items():
        stored = json.loads(paths.metrics(name).read_text()) | {"fd_classifier_5k": value}
        write(paths.metrics(name), stored | {"intervals": {"fd_classifier_5k": [value - 1, value + 1]}})
    assert "run b, the lowest, not told apart from a" in built(params).text


@pytest.mark.parametrize("intervals", [[1, 2], {"fd_classifier_5k": 3.0}, {"fd_classifier_5k": ["x", 1]}])
def test_damaged_intervals_are_a_clear_error(project: Path, intervals: Any) -> None:
    params = make_params()
    write_inputs(params)
    write(paths.metrics("t4"), json.loads(paths.metrics("t4").read_text()) | {"intervals": intervals})
    with pytest.raises(UserError, match="intervals that are no pairs of numbers"):
        built(params)


def test_latex_is_escaped_has_rules_and_says_the_sample_count(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    built(params)
    text = (paths.REPORTS / "paper_one_step.tex").read_text()
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
            assert (paths.REPORTS / f"{name}.{kind}").stat().st_size > 20


def test_a_run_has_a_page_with_its_settings_protocol_and_events(project: Path) -> None:
    phases = [{"until_epoch": 6}, {"until_epoch": 8, "reload_ema": "epoch", "reload_discriminator": 4}]
    params = make_params(a={"phases": phases}, b={})
    write_inputs(params)
    event = {"update": 12, "images": 768, "kind": "stall", "text": "D reloaded <by hand>"}
    paths.events("a").parent.mkdir(exist_ok=True)
    paths.events("a").write_text(json.dumps(event) + "\n")
    index = built(params)
    page = Page((paths.REPORTS / "runs" / "a.html").read_text())
    for words in ("reload_discriminator: 4.0", "stall: D reloaded <by hand> (update 12)", "a phase ends: epoch 6"):
        assert words in page.text
    assert "D reloaded from epoch 4" in page.text
    assert "1000" in page.text  # the seed, of the protocol
    assert {"../index.html", "b.html", "../../metrics/a.json"} <= {str(link["href"]) for link in page.all("a")}
    for link in page.all("a"):
        if not str(link["href"]).startswith("#"):
            assert (paths.REPORTS / "runs" / str(link["href"])).is_file()
    marks = [each for each in index.all("path") if "mark" in str(each.get("class"))]
    assert any("intervention" in str(each["class"]) for each in marks)


def test_damaged_events_name_their_line(project: Path) -> None:
    params = make_params()
    write_inputs(params)
    paths.events("t4").parent.mkdir(exist_ok=True)
    paths.events("t4").write_text("{}\n")
    with pytest.raises(UserError, match=r"events/t4.jsonl, line 1, expected update, images, kind and text"):
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
    work = xl2_work(load_params(Path(__file__).parents[1] / "params.yaml").train)
    assert work.units == pytest.approx(14.5, rel=0.03)
    assert sum(work.parts) == work.flops
    # G forward and backward, D forward and backward, as the paper adds them up.
    assert [part / work.forward_flops for part in work.parts] == pytest.approx([2, 2, 4.5, 6], rel=0.03)
