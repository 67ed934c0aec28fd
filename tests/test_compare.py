"""Tests of the OpenMoji example's comparison of settings."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import compare
import dataset
import emulated
import recipe

FEW = {"skin tone": 12, "hair": 8, "color": 12}


def runs(*accuracies: float) -> list[dict[str, float]]:
    """What trainings with these accuracies would have measured; the loss of all is the same."""
    same = dict.fromkeys(("psnr", "inside", "outside", "unchanged", "loss"), 0.25)
    return [{"accuracy": accuracy, **same} for accuracy in accuracies]


@pytest.mark.parametrize(
    ("one", "other", "marked"),
    [
        ((0.80, 0.82), (0.85, 0.87), "+0.050*"),
        ((0.85, 0.87), (0.80, 0.82), "-0.050*"),
        ((0.80, 0.82), (0.82, 0.83), "+0.015 "),  # one seed differs by more from another
        ((0.80, 0.81), (0.82, 0.88), "+0.045 "),
    ],
)
def test_a_difference_counts_where_seeds_differ_by_less(
    one: tuple[float, ...], other: tuple[float, ...], marked: str
) -> None:
    """The larger range of the two settings is what the means have to differ by; no difference is none."""
    settings = {"as it is": runs(*one), "--snr_gamma 5": runs(*other), "--lora_rank 4": runs(*one)}
    lines = compare.table(settings).splitlines()
    names = ["as it is", "--snr_gamma 5", "difference", "--lora_rank 4", "difference"]
    assert [line[:13].strip() for line in lines[1:6]] == names
    assert "+0.000 " in lines[5]
    assert marked in lines[3]
    assert "+0.0000 " in lines[3]
    assert f"{one[0] / 2 + one[1] / 2:.3f} (range {one[1] - one[0]:.3f})" in lines[1]


def test_what_another_recipe_reached_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement is kept as long as the scripts that set the recipe stay as they are."""
    trained: list[int] = []
    monkeypatch.setattr(compare, "train", lambda *given: trained.append(given[3]))
    for name in ("prepare", "encoded", "edit"):
        monkeypatch.setattr(compare, name, lambda *_: None)
    monkeypatch.setattr(compare, "score", lambda _data, _edits, folder: folder.mkdir(parents=True) or {"all": {}})
    monkeypatch.setattr(compare, "loss", lambda *_: 0.5)
    script = tmp_path / "recipe.py"
    monkeypatch.setattr(compare, "__file__", str(script.with_name("compare.py")))
    for text in ("steps = 1", "steps = 1", "steps = 2"):
        script.write_text(text)
        assert compare.measure(compare.Setting(), recipe.DEMO, 7, tmp_path)["loss"] == 0.5
    assert trained == [7, 7]


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_emulated_as_a_processor_computes_it(autocast: bool) -> None:
    """Factors and product are rounded, whether the model or autocast makes them bfloat16; what is float32 stays so."""
    torch.manual_seed(0)
    factors = torch.randn(4, 64), torch.randn(8, 64)
    seen: list[tuple[torch.dtype, bool]] = []

    def product(*given: torch.Tensor) -> torch.Tensor:
        seen.append((given[0].dtype, torch.is_autocast_enabled("cpu")))
        return F.linear(*given)

    linear = emulated.in_float32(product)
    assert torch.equal(linear(*factors), F.linear(*factors))
    if not autocast:
        factors = factors[0].bfloat16(), factors[1].bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = linear(*factors), F.linear(*factors)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    assert seen == [(torch.float32, False)] * 2


def call(_: str, *command: str | Path) -> None:
    """What `recipe.run` does, within this process: importing torch again for each command would take minutes."""
    first, *rest = map(str, command)
    if first == "-m":
        name, *rest = rest
        status = importlib.import_module(f"{name}.__main__").main(rest)
        assert not status
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", [first, *rest])
            importlib.import_module(Path(first).stem).main()


@pytest.mark.slow  # four trainings of a few steps, by the commands
def test_a_comparison_measures_both_settings_with_each_seed_and_keeps_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What hardly learns differs by more than chance; what was measured is kept; without a setting it is an error."""
    monkeypatch.setattr(dataset, "TRAIN", FEW)
    monkeypatch.setattr(dataset, "TEST", FEW)
    monkeypatch.setattr(compare, "make_pairs", lambda _, data: dataset.build(data))
    monkeypatch.setattr(recipe, "run", lambda title, *command: ran.append(title) or call(title, *command))
    ran: list[str] = []
    flags = ["compare.py", "--output", str(tmp_path), "--steps", "30"]
    monkeypatch.setattr("sys.argv", [*flags, "--train", "--learning_rate 1e-9"])
    compare.main()
    first = capfd.readouterr().out.partition("30 steps, seeds 0 1")[2]
    plain, slow, difference = first.splitlines()[2:5]
    assert (plain[:8], slow[:20], difference[:10]) == ("as it is", "--learning_rate 1e-9", "difference")
    assert re.search(r"[+-]0\.\d+\*$", difference)  # the loss
    measured = [json.loads(path.read_text()) for path in tmp_path.glob("*/measured.json")]
    assert sorted((run["setting"]["train"], run["seed"]) for run in measured) == [
        ("", 0), ("", 1), ("--learning_rate 1e-9", 0), ("--learning_rate 1e-9", 1)
    ]  # fmt: skip
    compare.main()
    assert capfd.readouterr().out.partition("30 steps, seeds 0 1")[2] == first
    assert (
        sorted(ran)
        == ["Edit held-out emoji"] * 4 + ["Encode it once"] * 2 + ["Score the edits"] * 4 + ["Train from the cache"] * 4
    )
    monkeypatch.setattr("sys.argv", flags)
    with pytest.raises(SystemExit):
        compare.main()
    assert "name the setting to compare" in capfd.readouterr().err
