"""Documents of files of every kind, the fields that are found in them, and each message about what is wrong."""

import csv
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from libraries import needs

from trak_fast.lm.texts.documents import Document, Documents, Fields, read_documents
from trak_fast.lm.texts.files import find_sources

ROWS = [{"id": "a", "text": "one"}, {"id": "b", "text": ""}, {"id": "a", "text": "três\u2028\x85 lines"}]


@pytest.fixture(autouse=True)
def in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs each test in a folder of its own, so that messages have short names."""
    monkeypatch.chdir(tmp_path)


def lines(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(name: str, *rows: object) -> None:
    Path(name).write_text(lines(*rows), encoding="utf-8")


def texts(documents: Documents) -> list[str | None]:
    return [document.text for document in documents]


def write_parquet(name: str) -> None:
    needs("pyarrow")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), name)


def write_csv(name: str) -> None:
    with Path(name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "text"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_saved(name: str) -> None:
    datasets = needs("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(name)


WRITERS: dict[str, Callable[[str], object]] = {
    "x.jsonl": lambda name: write(name, *ROWS),
    "lines.json": lambda name: write(name, *ROWS),
    "array.json": lambda name: Path(name).write_text(json.dumps(ROWS, indent=1)),
    "object.json": lambda name: Path(name).write_text(json.dumps({"version": 1, "data": ROWS})),
    "x.csv": write_csv,
    "x.parquet": write_parquet,
    "saved": write_saved,
}


@pytest.mark.parametrize("name", WRITERS)
def test_files_of_every_kind_hold_the_same_documents(name: str) -> None:
    WRITERS[name](name)
    read = read_documents([name])
    assert list(read) == [
        Document(file=name, place=i + 1, row=i, id=str(row["id"]), text=row["text"]) for i, row in enumerate(ROWS)
    ]
    assert read.fields == ("text",)
    assert read.documents[2].where == f"{name}:3"


def test_a_text_file_has_a_document_a_line_and_blank_lines_count() -> None:
    Path("x.txt").write_bytes("\ufeffone\r\n\r\n  two \x0c\n \nthrée".encode())
    read = read_documents(["x.txt"])
    assert [(document.place, document.text) for document in read] == [(1, "one"), (3, "  two \x0c"), (5, "thrée")]


def test_a_text_file_is_one_document_by_file() -> None:
    Path("a.txt").write_bytes(b"one\r\n\r\ntwo\n")
    Path("b.txt").write_text("three")
    read = read_documents(["b.txt", "a.txt"], by_file=True)
    assert [(document.where, document.text) for document in read] == [("b.txt:1", "three"), ("a.txt:1", "one\n\ntwo\n")]


def test_blank_lines_of_json_lines_count_and_line_ends_and_the_byte_order_mark_do_not_matter() -> None:
    Path("x.jsonl").write_bytes('\ufeff{"text": "one"}\r\n\r\n{"text": "two"}'.encode())
    assert [(document.place, document.text) for document in read_documents(["x.jsonl"])] == [(1, "one"), (3, "two")]


def test_folders_are_read_sorted_by_name_and_say_what_they_left_out() -> None:
    for name in ("data/b.jsonl", "data/a/z.jsonl", "data/c.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        write(name, {"text": name})
    for name in ("data/README.md", "data/.hidden.jsonl"):
        Path(name).touch()
    write("first.jsonl", {"text": "first"})
    read = read_documents(["first.jsonl", "data"])
    assert [document.file for document in read] == ["first.jsonl", "data/a/z.jsonl", "data/b.jsonl", "data/c.txt"]
    assert [document.row for document in read] == [0, 1, 2, 3]
    assert read.skipped == ("data/README.md",)


def test_a_folder_of_splits_names_them() -> None:
    datasets = needs("datasets")
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=data, test=data).save_to_disk("saved")
    assert refusal(["saved"]) == "saved holds several splits; give saved/test or saved/train"
    assert texts(read_documents(["saved/train"])) == [row["text"] for row in ROWS]


def test_long_fields_and_line_ends_in_them_are_read_from_csv_and_the_limit_is_left_alone() -> None:
    long = "line\n" * 100_000
    Path("x.csv").write_text(f'text,id\n"{long}",1\n\nshort,2\n')
    limit = csv.field_size_limit()
    read = read_documents(["x.csv"])
    assert [(document.place, document.text, document.id) for document in read] == [(1, long, "1"), (2, "short", "2")]
    assert csv.field_size_limit() == limit


def test_numbers_that_are_none_and_deep_objects_do_not_matter() -> None:
    deep = "[" * 500 + "]" * 500
    Path("x.jsonl").write_text('{"text": "one", "loss": NaN, "deep": ' + deep + ', "id": 7}\n')
    assert list(read_documents(["x.jsonl"])) == [Document(file="x.jsonl", place=1, row=0, id="7", text="one")]


def test_a_limit_leaves_what_follows_unread() -> None:
    Path("x.jsonl").write_text(lines(*ROWS[:2]) + "broken")
    write("y.jsonl", *ROWS)
    assert texts(read_documents(["x.jsonl", "y.jsonl"], limit=2)) == ["one", ""]
    assert refusal(["x.jsonl"], limit=0) == "--limit must be 1 or more, not 0"


STYLES: list[tuple[list[Mapping[str, Any]], tuple[str, ...], list[str]]] = [
    (
        [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}], "text": "no"}],
        ("messages",),
        ["user: Hi\nassistant: Yes"],
    ),
    (
        [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}],
        ("conversations",),
        ["user: Hi\nassistant: Yes"],
    ),
    ([{"text": "no", "prompt": "1+1=", "completion": "2"}], ("prompt", "completion"), ["1+1=2"]),
    ([{"text": "both", "prompt": "a", "completion": "b"}, {"text": "one"}], ("text",), ["both", "one"]),
    ([{"text": "both", "prompt": "a", "completion": None}], ("text",), ["both"]),
]


@pytest.mark.parametrize(("rows", "fields", "shown"), STYLES)
def test_fields_are_found_that_all_rows_have(
    rows: list[Mapping[str, Any]], fields: tuple[str, ...], shown: list[str]
) -> None:
    write("x.jsonl", *rows)
    read = read_documents(["x.jsonl"])
    assert read.fields == fields
    assert [document.shown for document in read] == shown


def test_alpaca_rows_have_the_prompt_that_alpaca_was_trained_with() -> None:
    write(
        "x.jsonl",
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hello"},
        {"instruction": "Greet.", "output": "Hello"},
    )
    read = read_documents(["x.jsonl"])
    assert read.fields == ("instruction", "input", "output")
    assert [document.completion for document in read] == ["3", "Hello", "Hello"]
    assert all(document.ends_with_eos for document in read)
    assert read.documents[0].prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:"
    )
    assert (
        read.documents[1].prompt
        == read.documents[2].prompt
        == (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nGreet.\n\n### Response:"
        )
    )


def test_braces_in_an_instruction_stay() -> None:
    write("x.jsonl", {"instruction": "Fill {input}", "input": "{0}", "output": "{}"})
    assert "Fill {input}\n\n### Input:\n{0}\n\n" in read_documents(["x.jsonl"]).documents[0].shown


def test_flags_come_before_what_would_be_found() -> None:
    row = {"text": "t", "prompt": "p", "completion": "c", "answer": "a", "key": 3, "source": "s", "class": 1, "id": "i"}
    write("x.jsonl", row)
    named = Fields(completion="answer", id="key", group="source", label="class")
    assert list(read_documents(["x.jsonl"], named)) == [
        Document(file="x.jsonl", place=1, row=0, id="3", group="s", label=1, prompt="p", completion="a")
    ]
    read = read_documents(["x.jsonl"], Fields(text="answer"))
    assert list(read) == [Document(file="x.jsonl", place=1, row=0, id="i", text="a")]
    assert read.fields == ("answer",)


def test_labels_and_ids_that_are_neither_string_nor_whole_number_are_none_where_no_flag_asks() -> None:
    write("x.jsonl", {"text": "t", "id": [1], "label": 0.5}, {"text": "t", "id": True, "label": "good"})
    assert [(document.id, document.label) for document in read_documents(["x.jsonl"])] == [(None, None), (None, "good")]


def test_messages_keep_what_a_template_may_use_but_not_what_is_null() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    write("x.jsonl", {"messages": [{"role": "user", "content": "1+1", "name": None}, call]})
    document = read_documents(["x.jsonl"]).documents[0]
    assert document.messages == (
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "tool_calls": [{"name": "add"}]},
    )
    assert document.shown == "user: 1+1\nassistant: "


def refusal(paths: list[str], fields: Fields | None = None, **options: Any) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        read_documents(paths, fields, **options)
    return str(caught.value)


CHAT = '{"messages": [{"role": "user", "content": "Hi"}, %s]}'
MALFORMED: list[tuple[str, bytes | str, str]] = [
    (
        "wiki.jsonl",
        '{"text": "a"}\n\n{"title": "b", "body": "long"}',
        'wiki.jsonl:3 has no field "text", only "title", "body"; --text body',
    ),
    ("wiki.jsonl", '{"size": 3}', 'wiki.jsonl:1 has no field "text", only "size"; --text NAME'),
    ("wiki.jsonl", "{}", 'wiki.jsonl:1 has no field "text", nor any other'),
    (
        "wiki.jsonl",
        '\n{"text": "a"}\n{"text": "and so on" "b"}',
        "wiki.jsonl:3 is not JSON (Expecting ',' delimiter: column 22)",
    ),
    ("x.json", '[\n{"text": "a"},\n{"text" "b"}]', "x.json:3 is not JSON (Expecting ':' delimiter: column 9)"),
    ("x.jsonl", '["a"]', "x.jsonl:1 must be a JSON object, with a field for the text, not an array"),
    ("x.json", '["a"]', "x.json:1 must be a JSON object, with a field for the text, not a string"),
    ("x.json", "3", "x.json must be an array of objects, or an object of one array, not a number"),
    (
        "x.json",
        '{"train": [], "test": []}',
        'x.json must be one array of objects, not an object of several: "train", "test"; save one of them',
    ),
    ("x.jsonl", '{"text": null}', 'x.jsonl:1 has null in "text", which must be a string'),
    ("x.jsonl", '{"text": "a"}\n{"text": 3}', 'x.jsonl:2 has a number in "text", which must be a string'),
    ("x.jsonl", '{"text": ["a"]}', 'x.jsonl:1 has an array in "text", which must be a string'),
    ("x.jsonl", '{"text": {}}', 'x.jsonl:1 has an object in "text", which must be a string'),
    ("x.jsonl", '{"text": true}', 'x.jsonl:1 has a boolean in "text", which must be a string'),
    ("x.jsonl", '{"text": "\\ud800"}', 'x.jsonl:1 has half a character (\\ud800) in "text"; mend the text'),
    (
        "x.jsonl",
        b'{"text": "a"}\n{"text": "\xff"}',
        "x.jsonl:2 is not UTF-8 (byte 0xff is number 11 of the line); save the file as UTF-8",
    ),
    ("x.csv", b"text\n\xff\n", "x.csv:2 is not UTF-8 (byte 0xff is number 1 of the line); save the file as UTF-8"),
    ("x.csv", "id,text\n1,a,b\n", "x.csv:1 has 3 values, and the header 2 names"),
    ("x.csv", "id,text\n1,a\n2\n", "x.csv:2 has 1 values, and the header 2 names"),
    ("x.csv", "text,text\n1,a\n", 'x.csv has the field "text" twice in its header; rename one'),
    ("x.csv", 'text\n"a\n', "x.csv is not CSV (unexpected end of data: line 2)"),
    ("x.csv", "text\n", "x.csv has no documents"),
    ("x.jsonl", "", "x.jsonl has no documents"),
    ("x.jsonl", "\n \n", "x.jsonl has no documents"),
    ("x.json", "", "x.json has no documents"),
    ("x.json", "[]", "x.json has no documents"),
    ("x.txt", "\n\n", "x.txt has no documents"),
    ("x.md", "a", "x.md must end in .jsonl, .json, .csv, .parquet, .txt, or be a folder; rename or convert it"),
    (
        "x.jsonl",
        '{"messages": "Hi"}',
        'x.jsonl:1 has a string in "messages", which must be an array of messages; --text names another',
    ),
    (
        "x.jsonl",
        '{"messages": []}',
        'x.jsonl:1 has an empty array in "messages", which must be an array of messages; --text names another',
    ),
    ("x.jsonl", CHAT % '"a"', 'x.jsonl:1 has in message 2 of "messages" a string, which must be an object'),
    ("x.jsonl", CHAT % '{"role": "user"}', 'x.jsonl:1 has in message 2 of "messages" no "content", only "role"'),
    (
        "x.jsonl",
        CHAT % '{"role": "user", "content": [1]}',
        'x.jsonl:1 has in message 2 of "messages" an array as "content", which must be a string',
    ),
    (
        "x.jsonl",
        CHAT % '{"role": 1, "content": ""}',
        'x.jsonl:1 has in message 2 of "messages" a number as "role", which must be a string',
    ),
    (
        "x.jsonl",
        CHAT % '{"role": "assistant", "content": ""}' + '\n{"text": "a"}\n{"messages": [{}]}',
        'x.jsonl:2 has no field "messages", only "text"; --text text',
    ),
    (
        "x.jsonl",
        '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "answer": "b"}',
        'x.jsonl:2 has no field "completion", only "prompt", "answer"; --completion answer',
    ),
    (
        "x.jsonl",
        '{"instruction": "a", "input": 3, "output": "b"}',
        'x.jsonl:1 has a number in "input", which must be a string',
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), MALFORMED)
def test_what_is_malformed_is_refused_by_file_and_place(name: str, content: bytes | str, message: str) -> None:
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert refusal([name]) == message


def test_nesting_beyond_what_can_be_read_is_refused() -> None:
    Path("x.jsonl").write_text('{"text": "a"}\n' + "[" * 100_000)
    assert refusal(["x.jsonl"]).startswith("x.jsonl:2 is JSON that cannot be read (")


def test_a_file_that_is_no_parquet_is_refused() -> None:
    needs("pyarrow")
    Path("x.parquet").write_text("text")
    assert refusal(["x.parquet"]).startswith("x.parquet is not parquet (")


def test_missing_paths_and_folders_without_documents_are_named() -> None:
    assert refusal(["wiki.jsonl"]) == "wiki.jsonl does not exist"
    Path("data").mkdir()
    Path("data/notes.md").touch()
    assert refusal(["data"]) == "data has no file that is read: .jsonl, .json, .csv, .parquet, .txt"
    assert refusal([]) == "no file of documents was given"


@pytest.mark.parametrize(("name", "package"), [("x.parquet", "pyarrow"), ("saved", "datasets")])
def test_a_missing_package_is_named(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS[name](name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"{package}.parquet", raising=False)
    what = "parquet" if package == "pyarrow" else "a folder of save_to_disk"
    assert refusal([name]) == f"reading {what} needs {package}: pip install {package}"


FLAGS: list[tuple[Fields, str]] = [
    (Fields(text="bodi"), 'no row of x.jsonl has the field "bodi" of --text, only "text", "title", "id"'),
    (Fields(completion="title"), 'x.jsonl:1 has no field "prompt", only "text", "title", "id"; --prompt text'),
    (Fields(id="key"), 'no row of x.jsonl has the field "key" of --id, only "text", "title", "id"'),
    (Fields(group="title"), 'x.jsonl:2 has no field "title", only "text"; --group takes a field that every row has'),
    (Fields(id="id"), 'x.jsonl:1 has an array in "id", which must be a string or a whole number'),
    (
        Fields(text="text", prompt="title"),
        "--text must stand alone, without --prompt and --completion; leave out one or the other",
    ),
]


@pytest.mark.parametrize(("fields", "message"), FLAGS)
def test_flags_that_do_not_fit_the_rows_are_refused(fields: Fields, message: str) -> None:
    write("x.jsonl", {"text": "longer", "title": "a", "id": [1]}, {"text": "b"})
    assert refusal(["x.jsonl"], fields) == message


def test_by_file_is_refused_for_files_of_rows() -> None:
    write("x.jsonl", *ROWS)
    assert refusal(["x.jsonl"], by_file=True) == "--by-file is for .txt files, and x.jsonl is none; leave it out"


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.txt").write_text("one\n")
    (folder / "inner" / "b.txt").write_text("two\n")
    (folder / "inner" / "again").symlink_to(folder)
    (folder / "other").symlink_to(folder / "inner")
    assert [path.name for path in find_sources([folder]).paths] == ["a.txt", "b.txt"]
