"""report.json and report.html say what was measured, null where nothing was, and escape a model's names."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from sample_reports import EVIL, full_report, histogram, hostile_report, layers, mixed_report

from zqfp_compile.recipe import Recipe
from zqfp_compile.report import bars, heat_map, histograms, html, json_report, units
from zqfp_compile.report.model import (
    CertificateReport,
    EngineReport,
    LayerReport,
    LintReport,
    LogitsReport,
    Perplexity,
    Report,
    SizeReport,
)

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Collects tags, text and attributes, and fails on a tag closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def cells(self) -> list[str]:
        return [str(attrs["class"]) for tag, attrs in self.tags if tag == "rect" and "rx" in attrs]


# --- JSON


def test_json_has_the_promised_keys_and_values(tmp_path):
    json_report.write_json(full_report(), tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    data = json.loads(text)
    assert text.endswith("}\n")
    assert data["schema_version"] == 1
    assert data["model"] == "model.onnx"
    assert data["recipe"] == Recipe().to_dict()
    assert data["perplexity"] == {
        "original": 20.0,
        "compiled": 21.0,
        "text": "built-in text",
        "tokens": 20480,
        "increase_percent": pytest.approx(5.0),
    }
    assert data["logits"] == {"sqnr_db": 21.5, "cosine": 0.994, "kl": 0.06, "top1_agreement": 0.871}
    assert data["size"]["ratio"] == pytest.approx(0.46)
    assert data["layers"][0] == {
        "name": "model.layers.0.self_attn.q_proj",
        "k": 576,
        "n": 1536,
        "rewritten": True,
        "reason": None,
        "sqnr_db": 30.0,
        "bits": 4.27,
        "weight_format": "none",
        "lorc_rank": 0,
        "bits_with_lorc": None,
    }
    assert data["layers"][-1]["reason"] == "output projection"
    assert data["engine"]["profiles"][1]["fp8_gemms"] == 121
    assert data["engine"]["profiles"][0]["shapes"]["input_ids"] == [[1, 1], [1, 128], [1, 2048]]
    assert data["engine"]["lint"] == {"ok": True, "problems": []}
    assert data["certificate"] == {"layers_checked": 210, "mismatches": 0, "problems": [], "ok": True}
    assert data["embeddings"] == [
        {
            "name": "embed_<tokens>",
            "rows": 320,
            "width": 72,
            "original_bytes": 46080,
            "bytes": 24320,
            "shared_with": ["lm_head"],
            "sqnr_db": 32.0,
        }
    ]
    assert data["kv_cache"] == [{"past": "past.0.key", "present": "present.0.<key>", "scale": 0.0123}]
    scales = {"q_scale": 0.5, "k_scale": 0.25, "v_scale": 0.125}
    assert data["attention"] == [{"name": "layers.0.self_attn", **scales}]
    assert data["seconds"] == {"load": 0.42, "engine": 245.0}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", data["created"])


def test_what_was_not_measured_is_null():
    data = Report("model.onnx", {}).to_dict()
    nothing = ("perplexity", "logits", "engine", "certificate", "calibration", "distillation")
    nothing += ("peak_rss_bytes",)
    assert [data[key] for key in nothing] == [None] * len(nothing)
    assert data["size"] == {
        "original_bytes": None,
        "original_fp16_bytes": None,
        "compiled_bytes": None,
        "linear_bytes": None,
        "lorc_bytes": None,
        "ratio": None,
    }


def test_nan_infinity_and_numpy_scalars_become_json(tmp_path):
    report = full_report(
        logits=LogitsReport(float("inf"), float("nan"), np.float32(0.5), np.float64(0.25)),  # type: ignore[arg-type]
        perplexity=Perplexity(None, 20.0, "text", 3),
        peak_rss_bytes=np.int64(7),
    )
    json_report.write_json(report, tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert data["logits"] == {"sqnr_db": None, "cosine": None, "kl": 0.5, "top1_agreement": 0.25}
    assert data["perplexity"]["increase_percent"] is None
    assert data["peak_rss_bytes"] == 7


def test_keys_come_in_the_same_order_every_time():
    first, second = full_report().to_dict(), Report("other.onnx", {}).to_dict()
    assert list(first) == list(second)


def test_a_path_that_is_no_utf8_is_still_written(tmp_path):
    report = Report("caf\udce9.onnx", {})
    json_report.write_json(report, tmp_path / "report.json")
    html.write_html(report, tmp_path / "report.html")
    assert json.loads((tmp_path / "report.json").read_text())["model"] == "caf\udce9.onnx"
    assert "caf" in (tmp_path / "report.html").read_text()


def test_a_certificate_that_checked_nothing_is_not_ok():
    assert not CertificateReport(0, 0).ok
    assert not CertificateReport(5, 1).ok
    assert CertificateReport(5, 0).ok


def test_worst_layers_are_the_lowest_measured_ones():
    report = full_report(
        layers=(
            LayerReport("a", 1, 1, True, sqnr_db=20.0),
            LayerReport("b", 1, 1, True, sqnr_db=None),
            LayerReport("c", 1, 1, True, sqnr_db=float("nan")),
            LayerReport("d", 1, 1, True, sqnr_db=-3.0),
            LayerReport("e", 1, 1, False, "why", sqnr_db=-9.0),
        )
    )
    assert [layer.name for layer in report.worst_layers(3)] == ["d", "a"]


def test_summary_lines_leave_out_what_was_not_measured():
    lines = full_report().summary_lines()
    assert "210 of 211" in lines[0]
    assert "4.27 bits per weight (4.94 with LoRC)" in lines[0]
    assert any("20.000 -> 21.000 (+5.00%)" in line for line in lines)
    assert "top-1: 87.1% of the likeliest next tokens are the original's" in lines
    bare = Report("model.onnx", {}, layers(), bits_per_weight=4.27).summary_lines()
    assert bare[0].endswith("4.27 bits per weight")
    assert not any("None" in line for line in bare)


# --- HTML


def test_page_shows_the_numbers_with_units():
    text = Page(html.render_html(full_report(), [histogram()])).text
    for part in (
        "20.00 → 21.00",
        "+5.0% on 20,480 tokens of built-in text",
        "123.7 MB",
        "46.0% of 269.0 MB in 16 bits",
        "4.27",
        "4.94 with LoRC",
        "210 of 211",
        "FP8 in 210 of 210 linears; lint passed",
        "210 layers checked, 0 mismatches",
        "21.5 dB",
        "87.1%",
        "4 min 05 s",
        "3.00 GiB",
        "1x2048",
        "lm_head 576 × 49152 output projection",
        "scale-constraint e4m3",
        "random tokens",
    ):
        assert part in text, part


def test_options_that_were_changed_come_first():
    """And short steps do not hide the long ones."""
    report = full_report(
        recipe=Recipe(group_size=32).to_dict(), seconds={"load": 0.5, "tidy": 0.1, "engine": 99.0}
    )
    page = Page(html.render_html(report)).text
    recipe = page[page.index("Recipe") :]
    assert recipe.startswith("Recipe group-size 32 All 40 options in force")
    assert "2 shorter steps, in the total" not in page and "1 shorter steps, in the total" in page


def test_page_is_one_file_without_scripts_or_links():
    page = html.render_html(full_report(), [histogram()])
    assert not [tag for tag, _ in Page(page).tags if tag in ("script", "link", "img", "iframe", "object")]
    assert "http" not in page.replace("http-equiv", "")
    assert "prefers-color-scheme: dark" in page
    assert len(page) < 1_000_000  # the bound of the brief for 210 layers


def test_every_layer_is_a_cell_and_the_worst_are_marked():
    cells = Page(html.render_html(full_report())).cells()
    assert len(cells) == 2 * 210  # the error's map and the precision's
    assert sum("worst" in cell for cell in cells) == html.WORST_LAYERS
    assert {cell.split()[0] for cell in cells} == {f"s{i}" for i in range(heat_map.SHADES)}


def test_mixed_precision_is_three_maps():
    """Error of the rewritten layers, bits of all, ranks of the rewritten ones; one rank for all is no map."""
    report = mixed_report()
    page = html.render_html(report)
    assert len(Page(page).cells()) == 2 * len(report.rewritten) + len(report.layers)
    assert "model.layers.0.self_attn.q_proj: 4.27 bits, e2m1" in page
    assert ": 16.00 bits, float" in page and ": rank 64" in page
    assert ": rank" not in html.render_html(full_report())


def test_untrusted_names_are_escaped_everywhere():
    page = Page(html.render_html(hostile_report(), [histogram(EVIL)]))
    assert not [tag for tag, _ in page.tags if tag in ("script", "img")]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert page.text.count("alert(1)") >= 15


def test_page_works_with_every_part_missing(tmp_path):
    html.write_html(Report("model.onnx", {}), tmp_path / "report.html")
    text = Page((tmp_path / "report.html").read_text()).text
    assert "not built in this run" in text
    assert "errors were not measured" in text
    assert "None" not in text.replace("None: every", "")
    assert "nan" not in text


PARTS = ["perplexity", "logits", "engine", "certificate", "calibration", "distillation"]


@pytest.mark.parametrize("part", PARTS)
def test_page_works_with_one_part_missing(part):
    Page(html.render_html(full_report(**{part: None})))


def test_failures_are_alerts_at_the_top():
    report = full_report(
        certificate=CertificateReport(210, 3, ("layer x differs by 0.1",)),
        engine=EngineReport("tensorrt-rtx", "why", "e", 1, lint=LintReport(False, ("a half output",))),
    )
    page = Page(html.render_html(report))
    assert sum(attrs.get("role") == "alert" for _, attrs in page.tags) == 3
    start = page.text[: page.text.index("Bits per weight")]
    assert "The certificate failed: 3 of 210" in start
    assert "a half output" in start


def test_a_certificate_that_checked_nothing_is_an_alert():
    text = Page(html.render_html(full_report(certificate=CertificateReport(0, 0)))).text
    assert "The certificate failed: no layer was compared" in text


# --- the plots


def test_bytes_are_split_by_what_they_hold():
    parts = bars.compiled_parts(SizeReport(None, 200, 100, 50, 20))
    assert [(part.kind, part.value) for part in parts] == [("compiled", 50), ("lorc", 20), ("rest", 30)]
    assert [part.value for part in bars.compiled_parts(SizeReport(None, 200, 100))] == [100]
    without_lorc = bars.compiled_parts(SizeReport(None, 200, 100, 50, 0))
    assert [part.kind for part in without_lorc] == ["compiled", "rest"]


def test_bars_are_on_one_scale():
    engine = EngineReport("onnxruntime", "asked for", "onnxruntime.onnx", 400_000)
    plot = bars.size_plot(SizeReport(None, 200_000, 100_000, 50_000, 20_000), engine)
    widths = re.findall(r'<rect class="(\w+)" x="[\d.]+%" y="[\d.]+" width="([\d.]+)%"', str(plot))
    assert [(kind, float(width)) for kind, width in widths] == [
        ("original", 50),
        ("compiled", 12.5),
        ("lorc", 5),
        ("rest", 7.5),
        ("engine", 100),
    ]
    words = "Original, 16 bits: 200.0 kB; Compiled: 100.0 kB; Engine: 400.0 kB"
    assert f"<title>Bytes before and after</title><desc>{words}</desc>" in str(plot)


@pytest.mark.parametrize("values", [(None, 20.0), (20.0, None), (float("inf"), 20.0), (0.0, 20.0)])
def test_a_perplexity_that_cannot_be_compared_is_no_plot(values):
    assert bars.perplexity_plot(Perplexity(*values, "text", 3)) is None
    Page(html.render_html(full_report(perplexity=Perplexity(*values, "text", 3))))


def test_nothing_measured_is_no_plot():
    assert bars.size_plot(SizeReport(), None) is None
    assert bars.perplexity_plot(None) is None
    assert heat_map.heat_map(Report("model.onnx", {}).layers, heat_map.SQNR) is None


def test_rows_keep_the_graphs_order_where_layers_are_left_out():
    made = [LayerReport(f"m.layers.{b}.{kind}", 1, 1, True, sqnr_db=20.0) for b in (0, 1) for kind in "qkv"]
    made[0] = LayerReport("m.layers.0.q", 1, 1, False, "kept in float")
    heat = heat_map.heat_map(made, heat_map.SQNR)
    assert heat is not None and [row.label for row in heat.rows] == ["q", "k", "v"]


# --- the heat map and histograms


def rows_of(*names: str) -> list[str]:
    made = [LayerReport(name, 1, 1, True, sqnr_db=20.0 + i) for i, name in enumerate(names)]
    heat = heat_map.heat_map(made, heat_map.SQNR)
    assert heat is not None
    return [row.label for row in heat.rows]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"), ["up_proj"]),
        (("/model/layers.0/mlp/up_proj/MatMul", "/model/layers.1/mlp/up_proj/MatMul_3"), ["up_proj"]),
        (("h.0.attn.c_proj", "h.0.mlp.c_proj"), ["attn.c_proj", "mlp.c_proj"]),
        (("encoder.layers.0.fc1", "decoder.layers.0.fc1"), ["encoder.layers.*.fc1", "decoder.layers.*.fc1"]),
        (("m.layers.0.experts.0.w1", "m.layers.0.experts.1.w1"), ["w1"]),
        (("m.layers.0.q_proj", "lm_head"), ["q_proj", "lm_head"]),
        (("node_MatMul_4", "node_MatMul_9"), ["layers in graph order"]),
    ],
)
def test_rows_of_the_heat_map(names, expected):
    assert rows_of(*names) == expected


def test_a_cell_of_experts_shows_the_worst():
    made = [LayerReport(f"m.layers.0.experts.{i}.w1", 1, 1, True, sqnr_db=20.0 + i) for i in range(3)]
    heat = heat_map.heat_map(made, heat_map.SQNR)
    assert heat is not None
    assert "experts.0.w1: 20.0 dB (lowest of 3)" in heat.rows[0].svg


def test_shades_run_from_best_to_worst():
    assert [heat_map.shade(v, 24, 10) for v in (24, 23, 17, 10)] == [0, 0, 3, heat_map.SHADES - 1]
    assert [heat_map.shade(v, 4, 16) for v in (4, 10, 16)] == [0, 3, heat_map.SHADES - 1]
    assert heat_map.shade(5.0, 5.0, 5.0) == 0


def test_histogram_counts_every_weight_scale_and_code():
    item = histogram()
    assert sum(item.original) == sum(item.decoded) == 32 * 128
    assert sum(count for _, count in item.exponents) == 64
    assert sum(count for _, count in item.codes) == 32 * 128
    assert len(item.codes) == 15
    # 4-bit rounding of a normal distribution with per-group maximum: about 6.02 * 4 - 7 dB.
    assert item.weight_sqnr_db == pytest.approx(19.0, abs=2.0)


def test_exponents_of_powers_of_two_are_exact():
    scales = np.array([[2.0**-5, 1.0, 1.875, 2.0, 64.0]], np.float32)
    item = histograms.layer_histogram("x", np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32), scales)
    assert dict(item.exponents) == {e: {-5: 1, 0: 2, 1: 1, 6: 1}.get(e, 0) for e in range(-5, 7)}
    assert item.weight_sqnr_db is None
    Page(str(histograms.weight_plot(item)))


def test_histogram_rejects_two_shapes():
    with pytest.raises(ValueError, match="decoded is"):
        histograms.layer_histogram("x", np.zeros((1, 4), np.float32), np.zeros((4, 1), np.float32), None)


# --- units


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "–"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (144_200_000, "144.2 MB"),
        (999_960_000, "1.00 GB"),
    ],
)
def test_sizes_are_decimal(value, expected):
    assert units.format_bytes(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(2**30, "1.00 GiB"), (int(1.5 * 2**20), "1.50 MiB"), (None, "–")]
)
def test_memory_is_binary(value, expected):
    assert units.format_memory(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.424, "0.42 s"),
        (37.14, "37.1 s"),
        (99.96, "1 min 40 s"),
        (245, "4 min 05 s"),
        (7320, "2 h 02 min"),
        (None, "–"),
    ],
)
def test_times(value, expected):
    assert units.format_seconds(value) == expected


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [
        (4.267, 2, "4.27"),
        (0.0000123, 4, "1.2e-05"),
        (0.0, 2, "0.00"),
        (float("nan"), 2, "–"),
        (12345.6, 1, "12,345.6"),
    ],
)
def test_numbers(value, digits, expected):
    assert units.format_number(value, digits) == expected
