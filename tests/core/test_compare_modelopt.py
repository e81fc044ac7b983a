"""tools/compare_modelopt.py as far as it goes without Model Optimizer, no dependency of the project."""

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import compare_modelopt  # noqa: E402
import modelopt_lm  # noqa: E402

FILES = ["--model", "model.gguf", "--calibration", "valid.txt", "--test", "test.txt"]


def preset(**weight):
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": weight},
        ]
    }


INT4 = {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}
MXFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}
NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}


@pytest.mark.parametrize(
    ("weight", "k", "bits"),
    [
        (INT4, 256, 4 + 16 / 128),
        (INT4, 576, 4 + 16 * 5 / 576),  # the fifth group is half full
        (MXFP4, 256, 4.25),
        (NVFP4, 256, 4.5),
        ({"num_bits": 8, "axis": 0}, 256, 8 + 16 / 256),
        ({"num_bits": (4, 3), "axis": None}, 256, 8 + 32 / (64 * 256)),
    ],
)
def test_bits_of_a_weight(weight, k, bits):
    assert modelopt_lm.weight_storage(preset(**weight)).bits((64, k)) == pytest.approx(bits * 64 * k)


def test_w4a8_stores_the_first_of_its_two_quantisers():
    config = preset()
    config["quant_cfg"][-1]["cfg"] = [INT4, {"num_bits": (4, 3), "axis": None}]
    assert modelopt_lm.weight_storage(config) == modelopt_lm.Storage(4, 16, 128)


def test_methods_expand_in_table_order():
    values = compare_modelopt.parse_arguments([*FILES, "--methods", "fp8,zqfp"])
    assert values.methods == (*compare_modelopt.OURS, "fp8")


def test_unknown_method_is_named(capsys):
    with pytest.raises(SystemExit) as error:
        compare_modelopt.parse_arguments([*FILES, "--methods", "int5"])
    assert error.value.code == 2
    assert "--methods int5" in capsys.readouterr().err


def test_missing_modelopt_is_one_line_before_any_work(monkeypatch):
    def missing(name):
        raise modelopt_lm.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(modelopt_lm.importlib.metadata, "version", missing)
    with pytest.raises(SystemExit, match=r"^error: nvidia-modelopt is not installed; pip install -r [^\n]*$"):
        compare_modelopt.main([*FILES, "--methods", "int4-awq"])


def row(perplexity, bits):
    return {
        "weights": "w",
        "activations": "a",
        "bits_per_weight": bits,
        "perplexity": perplexity,
        "reference_perplexity": 10.0,
    }


def test_rivals_meet_our_best_at_no_more_bits():
    table = compare_modelopt.make_table(
        {
            "zqfp-gptq": row(12.0, 4.1),
            "zqfp-gptq-lorc32": row(11.0, 4.9),  # lower, but of more bits than the rivals
            "w4a16-nvfp4": row(12.5, 4.5),
            "w4a8-mxfp4": row(11.5, 4.25),
            "int4-awq": row(13.0, 4.0),
        }
    )
    cells = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines()}
    assert "12.000, lower: zqfp-gptq, 4.100 bits" in cells["w4a16-nvfp4 (W4A16_NVFP4_CFG)"]
    assert "12.000, not lower: zqfp-gptq" in cells["w4a8-mxfp4 (W4A8_MXFP4_FP8_CFG)"]
    assert cells["int4-awq (INT4_AWQ_CFG)"].endswith("| none |")
    assert "| +10.00% |  |" in cells["zqfp-gptq-lorc32"]


def test_a_result_is_found_again_under_the_same_setting_only():
    def key(*more):
        return compare_modelopt.state_key(compare_modelopt.parse_arguments([*FILES, *more]), "zqfp-gptq")

    assert key() == key("--methods", "zqfp-gptq")
    assert key() != key("--samples", "4")


def test_configs_add_methods(tmp_path):
    path = tmp_path / "more.json"
    path.write_text('[{"name": "mine", "group_size": 32}]')
    values = compare_modelopt.parse_arguments([*FILES, "--configs", str(path), "--methods", "mine,fp8"])
    assert values.methods == ("mine", "fp8")
    assert values.ours["mine"].group_size == 32
    assert f"--configs {path}" in compare_modelopt.command(values, "mine")
    assert "--configs" not in compare_modelopt.command(values, "fp8")
