"""Tests of how columns are found: the schemas of known datasets, flags, names that say it, and what is refused."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from forms import NAMES, PAIRS, Flags, image_files, jpeg, opened
from ip2p.encode.base.errors import SourceError
from ip2p.encode.data.cells import column_kinds
from ip2p.encode.data.columns import IMAGES, PRESETS, TEXT, known_columns
from ip2p.encode.data.pairs import Pair

IMAGE, STRING, INTEGER, NUMBER = datasets.Image(), *map(datasets.Value, ("string", "int64", "float64"))

# As the datasets are on the Hub: the split, the columns of original, edited image and instruction, and others.
SCHEMAS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fusing/instructpix2pix-1000-samples": ("train", "input_image edited_image edit_prompt", {}),
    "timbrooks/instructpix2pix-clip-filtered": (
        "train",
        "original_image edited_image edit_prompt",
        {"original_prompt": STRING, "edited_prompt": STRING},
    ),
    "osunlp/MagicBrush": (
        "train",
        "source_img target_img instruction",
        {"img_id": STRING, "turn_index": INTEGER, "mask_img": IMAGE},
    ),
    "BleachNick/UltraEdit_500k": (
        "FreeForm",
        "source_image edited_image edit_prompt",
        {"clip_sim_source": NUMBER, "source_caption": STRING, "target_caption": STRING},
    ),
    "BleachNick/UltraEdit_Region_Based_100k": (
        "RegionBase",
        "source_image edited_image edit_prompt",
        {"mask_image": IMAGE, "source_caption": STRING, "target_caption": STRING},
    ),
    "UCSC-VLAA/HQ-Edit": (
        "train",
        "input_image output_image edit",
        {"input": STRING, "output": STRING, "inverse_edit": STRING},
    ),
    "McGill-NLP/AURORA": ("train", "input output instruction", {"source": STRING}),
    "TIGER-Lab/OmniEdit-Filtered-1.2M": (
        "train",
        "src_img edited_img edited_prompt_list",
        {"omni_edit_id": STRING, "task": STRING, "width": INTEGER, "sc_score_1": NUMBER},
    ),
    "Bin1117/AnyEdit": (
        "train",
        "image_file edited_file edit_instruction",
        {"edit_type": STRING, "input": STRING, "output": STRING, "visual_input": IMAGE},
    ),
    "instruction-tuning-sd/cartoonization": ("train", "original_image cartoonized_image edit_prompt", {}),
}


def write(folder: Path, name: str) -> Path:
    """Three pairs in a folder, with the schema of a known dataset."""
    split, roles, others = SCHEMAS[name]
    original, edited, prompt = roles.split()
    prompts = datasets.List(STRING) if prompt.endswith("_list") else STRING
    features = datasets.Features({original: IMAGE, edited: IMAGE, prompt: prompts} | others)
    other = ((IMAGE, jpeg(999)), (STRING, "another text"), (INTEGER, 1), (NUMBER, 0.5))
    rows = [
        {original: pair.original, edited: pair.edited, prompt: pair.instruction}
        | {column: next(value for kind, value in other if kind == others[column]) for column in others}
        for pair in PAIRS[:3]
    ]
    for row in rows:
        if prompts != STRING:
            row[prompt] = [row[prompt], f"{row[prompt]}, please"]
    folder.mkdir(parents=True)
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def write_lines(folder: Path, *columns: str) -> Flags:
    """Two pairs in a folder, with columns of these names."""
    folder.mkdir()
    rows = []
    for number, pair in enumerate(PAIRS[:2]):
        (folder / f"{number}a.jpg").write_bytes(pair.original or b"")
        (folder / f"{number}b.jpg").write_bytes(pair.edited or b"")
        values = (f"{number}a.jpg", f"{number}b.jpg", pair.instruction, "another text")
        rows.append(dict(zip(columns, values, strict=False)))
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"train_data_dir": folder}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_known_dataset_needs_no_flags(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its id alone the right columns of the right split are taken, whatever else is there; nothing is guessed."""
    write(tmp_path / name, name)
    monkeypatch.chdir(tmp_path)
    source = opened({"dataset_name": name})
    assert source.columns == tuple(SCHEMAS[name][1].split())
    assert [source[index] for index in range(len(source))] == PAIRS[:3]
    assert capsys.readouterr().out == ""


MASKS = {"osunlp/MagicBrush": "mask_img", "BleachNick/UltraEdit_Region_Based_100k": "mask_image"}


@pytest.mark.parametrize("name", MASKS)
def test_the_masks_of_a_known_dataset_are_known(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --mask_column auto they are taken, without that flag they are not."""
    write(tmp_path / name, name)
    monkeypatch.chdir(tmp_path)
    source = opened({"dataset_name": name, "mask_column": "auto"})
    assert source.columns == (*SCHEMAS[name][1].split(), MASKS[name])
    assert [source[index] for index in range(len(source))] == [pair._replace(mask=jpeg(999)) for pair in PAIRS[:3]]
    assert not opened({"dataset_name": name}).masks


def test_every_preset_but_one_has_a_schema_here() -> None:
    """A preset is checked with the schema it is for; that of UltraEdit is its half million's."""
    assert PRESETS.keys() - SCHEMAS.keys() == {"BleachNick/UltraEdit"}
    assert known_columns("BleachNick/UltraEdit") == known_columns("BleachNick/UltraEdit_500k")


@pytest.mark.parametrize("folder", ["magicbrush", "copies/MAGICBRUSH", "MagicBrush"])
def test_a_folder_that_is_called_like_a_known_dataset_is_one(folder: str, tmp_path: Path) -> None:
    """Upper and lower case, and where the folder lies, do not matter."""
    write(tmp_path / folder, "osunlp/MagicBrush")
    assert opened({"dataset_name": tmp_path / folder}).columns == ("source_img", "target_img", "instruction")


def test_the_reversed_pairs_of_hq_edit_come_with_the_inverse_instruction(tmp_path: Path) -> None:
    """--reverse_pairs needs no column there."""
    source = opened({"dataset_name": write(tmp_path / "HQ-Edit", "UCSC-VLAA/HQ-Edit")}, reverse_pairs=True)
    assert source.columns == ("input_image", "output_image", "edit", "inverse_edit")
    assert (len(source), source[0], source[1]) == (
        6,
        PAIRS[0],
        Pair(PAIRS[0].edited, PAIRS[0].original, "another text"),
    )


def test_both_instructions_of_omniedit_can_be_samples(tmp_path: Path) -> None:
    """Each row there lists a long and a short instruction."""
    folder = write(tmp_path / "OmniEdit-Filtered-1.2M", "TIGER-Lab/OmniEdit-Filtered-1.2M")
    source = opened({"dataset_name": folder}, prompt_choice="all")
    assert [source[index].instruction for index in range(2)] == ["make it make", "make it make, please"]
    assert (len(source), source[1][:2]) == (6, PAIRS[0][:2])


@pytest.mark.parametrize(
    "name", ["sayakpaul/instructpix2pix-demo", "facebook/emu_edit_test_set", "local/folder/gedit-bench"]
)
def test_a_set_without_edited_images_is_refused_with_the_reason(name: str) -> None:
    """Nothing is fetched for it, and a copy to which somebody added edited images has a way in."""
    with pytest.raises(SourceError, match=r"made for evaluation.* no edited images.*--edited_image_column") as refused:
        opened({"dataset_name": name})
    assert name in str(refused.value)
    with pytest.raises(SourceError, match="cannot be opened"):  # it is not here
        opened({"dataset_name": name}, edited_image_column="mine")


def test_flags_win_over_presets_and_presets_over_names(tmp_path: Path) -> None:
    """Any column can be named by its flag; the others stay as they are known."""
    folder = write(tmp_path / "MagicBrush", "osunlp/MagicBrush")
    source = opened({"dataset_name": folder}, edited_image_column="mask_img", edit_prompt_column="img_id")
    assert source.columns == ("source_img", "mask_img", "img_id")


def test_a_known_dataset_with_other_columns_is_taken_as_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A preset that does not fit gives way to the names."""
    source = opened(write_lines(tmp_path / "MagicBrush", "before_img", "after_img", "instruction"))
    assert source.columns == ("before_img", "after_img", "instruction")
    assert "found original images in before_img (--original_image_column)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "columns",
    [
        "original edited text",
        "input_image_file_name edited_image_file_name instruction",
        "source_path target_path edit",
        "before.png after.png prompt.txt caption",
        "Input_Image Output_Image Instruction original",
    ],
)
def test_columns_of_an_unknown_dataset_are_guessed_and_said(
    columns: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only images are taken for images and text for text, and a line says which, with the flags that decide."""
    source = opened(write_lines(tmp_path / "data", *columns.split()))
    assert source.columns == tuple(columns.split()[:3])
    (line,) = capsys.readouterr().out.splitlines()
    assert all(part in line for part in (*source.columns, "--original_image_column", "--edit_prompt_column"))


# Columns of sets that came up in 2025 and 2026, as those who use them name them; none of these is a preset.
RECENT = {
    "HumanEdit": "INPUT_IMG OUTPUT_IMG EDITING_INSTRUCTION INPUT_CAPTION_BY_LLAMA",
    "pico-banana-400k": "local_input_image output_image text summarized_text edit_type",
    "SEED-Data-Edit-Part1": "source_image target_image instruction",
    "lists of both": "input_images output_images prompt",
}


@pytest.mark.parametrize("name", RECENT)
def test_columns_of_recent_datasets_are_guessed_and_said(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What their names say is taken; the line names the flags for who knows better."""
    source = opened(write_lines(tmp_path / name, *RECENT[name].split()[:4]))
    assert source.columns == tuple(RECENT[name].split()[:3])
    assert source[0].instruction == PAIRS[0].instruction
    said = capsys.readouterr().out
    assert all(flag in said for flag in ("--original_image_column", "--edited_image_column", "--edit_prompt_column"))


SPOKEN = [
    [{"role": "user", "content": "<image>\nmake it red"}, {"role": "assistant", "content": "<image>"}],
    [
        {"from": "system", "value": "you edit"},
        {"from": "human", "value": "make it red"},
        {"from": "gpt", "value": "ok"},
    ],
    [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "make it red"}]}],
]


@pytest.mark.parametrize("messages", SPOKEN)
def test_a_column_of_messages_that_is_named_gives_what_a_person_says_first(
    messages: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Placeholders of pictures are no words; unasked such a column is not taken, and the question names the flag."""
    rows = image_files(tmp_path / "data", PAIRS[:3])
    for row in rows:
        row["messages"] = messages  # type: ignore[assignment]
        del row["edit_prompt"]
    rows[2]["messages"] = [{"role": "assistant", "content": "who is there?"}]  # type: ignore[assignment]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags: Flags = {"train_data_dir": tmp_path / "data"}
    for choice in ("first", "all"):
        source = opened(flags, edit_prompt_column="messages", prompt_choice=choice)
        assert [source[row].instruction for row in range(len(source))] == ["make it red", "make it red", None]
    with pytest.raises(SourceError, match=r"edit instructions are in no column.*messages.*--edit_prompt_column"):
        opened(flags)


def test_a_row_of_several_turns_is_asked_about(tmp_path: Path) -> None:
    """Chains of edits, as Pico-Banana and SEED-Data-Edit have them, are never guessed at: the question names a flag."""
    rows = image_files(tmp_path / "seed", PAIRS[:2])
    turns = [
        {
            "source_image": row["input_image"],
            "instruction_1": "make it red",
            "edit_image_1": row["edited_image"],
            "instruction_2": "make it blue",
            "edit_image_2": row["edited_image"],
        }
        for row in rows
    ]
    (tmp_path / "seed" / "metadata.jsonl").write_text("\n".join(map(json.dumps, turns)))
    with pytest.raises(SourceError, match=r"edited images are in no column.*edit_image_1.*--edited_image_column"):
        opened({"train_data_dir": tmp_path / "seed"})
    one = {"edited_image_column": "edit_image_1", "edit_prompt_column": "instruction_1"}
    assert opened({"train_data_dir": tmp_path / "seed"}, **one)[1].instruction == "make it red"
    files = [{"id": "original_input_image", "url": "a.jpg"}, {"id": "final_image", "url": "b.jpg"}]
    (tmp_path / "turns.jsonl").write_text(json.dumps({"files": files, "metadata_edit_turn_prompts": ["a", "b"]}))
    with pytest.raises(SourceError, match=r"original images are in no column.*files.*--original_image_column"):
        opened({"dataset_name": tmp_path / "turns.jsonl"})


def test_usual_names_come_before_others_that_would_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """diffusers' own column names are no guess, even beside another column that could be meant."""
    source = opened(write_lines(tmp_path / "data", "input_image", "edited_image", "edit_prompt", "instruction"))
    assert source.columns == ("input_image", "edited_image", "edit_prompt")
    assert capsys.readouterr().out == ""


def test_what_columns_hold_is_told_from_their_types_and_values(tmp_path: Path) -> None:
    """Images are bytes, structs of bytes and path, names of image files and lists of these; links are none."""
    (tmp_path / "without ending").touch()
    image = {"bytes": None, "path": "a.jpg"}
    row = {
        "bytes": b"",
        "struct": image,
        "list": [image],
        "name": "folder/A.WEBP",
        "file": "without ending",
        "link": "https://example.org/a.png",
        "text": "make it a.png red",
        "texts": ["make it red"],
        "number": 1,
        "nothing": None,
    }
    table = pa.Table.from_pylist([dict.fromkeys(row), row])
    kinds = {column: column_kinds(table[column], tmp_path) for column in row}
    assert [column for column, found in kinds.items() if found[0] == IMAGES] == "bytes struct list name file".split()
    assert [column for column, found in kinds.items() if found == [TEXT]] == ["text", "texts"]
    assert (kinds["link"], kinds["number"], kinds["nothing"]) == (["urls", TEXT], ["int"], ["null"])
    assert column_kinds(table["name"], tmp_path / "not here") == ["paths", TEXT]


@pytest.mark.parametrize("text", ["x" * 256, "make it " + "very " * 20_000 + "red", "a\0b", "", "logo.png"])
@pytest.mark.parametrize("column", ["edit_prompt", "note"])
def test_a_text_is_no_file_name_whatever_it_says(text: str, column: str, tmp_path: Path) -> None:
    """The first value of any column may be long, or end like a picture; other values tell what the column holds."""
    rows = [dict(row) | {"note": "a"} for row in image_files(tmp_path / "data", PAIRS[:3])]
    rows[0][column] = text
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = opened({"train_data_dir": tmp_path / "data"})
    assert source.columns == NAMES
    assert source[0].instruction == (text if column == "edit_prompt" else PAIRS[0].instruction)


@pytest.mark.parametrize("column", ["edit_prompt", "wish"])
def test_a_column_that_is_named_may_hold_the_names_of_pictures_as_text(column: str, tmp_path: Path) -> None:
    """By flag or usual name all instructions may end in logo.png; files that are there are never instructions."""
    rows = [dict(row) for row in image_files(tmp_path / "data", PAIRS[:2])]
    rows = [row | {column: "add logo.png"} for row in rows]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags: Flags = {"train_data_dir": tmp_path / "data"}
    if column == "wish":
        flags["edit_prompt_column"] = column
    assert opened(flags)[1].instruction == "add logo.png"
    with pytest.raises(SourceError, match=r"column input_image of .* holds images, expected string"):
        opened({"train_data_dir": tmp_path / "data", "edit_prompt_column": "input_image"})


def test_images_are_those_of_a_named_column_though_most_are_not_there(tmp_path: Path) -> None:
    """Junk in an image column costs its samples, not the dataset."""
    rows = [dict(row) for row in image_files(tmp_path / "data", PAIRS[:5])]
    for row in rows[:4]:
        row["edited_image"] = "no picture at all"
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = opened({"train_data_dir": tmp_path / "data"})
    assert [source[index].edited for index in range(5)] == [None] * 4 + [PAIRS[4].edited]
