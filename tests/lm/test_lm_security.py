"""Models, adapters and runs of others: they run no code, name no file elsewhere, and reach for no network."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from base64 import b64encode
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hostile import plant
from libraries import needs
from lm_pages import HOSTILE
from lm_runs import call, page_data, save_model, succeed, texts_of, write
from model_folders import edit, refusal, save, save_adapter

from trak_fast.lm.folder import RunFolder
from trak_fast.lm.models.folders import find_models

safetensors = needs("safetensors.torch")

# peft asks transformers for it, while these tests build adapters
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ROOT = Path(__file__).resolve().parents[2]

QUICK = ["--proj-dim", 64, "--tokens", 0]


def as_torch_file(folder: Path, name: str) -> Path:
    """Replaces a file of safetensors by one of torch.save with the same weights, and returns it."""
    safe = folder / f"{name}.safetensors"
    file = folder / ("pytorch_model.bin" if name == "model" else f"{name}.bin")
    torch.save(safetensors.load_file(safe), file)
    safe.unlink()
    return file


@pytest.mark.parametrize("kind", ["pickle", "torch", "old torch"])
@pytest.mark.parametrize("name", ["model", "adapter_model"])
def test_weights_that_would_run_code_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    folder, mark = tmp_path / name, tmp_path / "code was run"
    save("llama", tmp_path / "model")
    if name == "adapter_model":
        save_adapter(tmp_path / "model", folder)
    plant(as_torch_file(folder, name), kind, mark)
    assert "cannot be" in refusal(folder, build=True)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["model", "adapter_model"])
def test_weights_of_torch_are_those_of_safetensors(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    save("llama", tmp_path / "model")
    if name == "adapter_model":
        save_adapter(tmp_path / "model", folder)
    expected = find_models([folder]).build().state_dict()
    as_torch_file(folder, name)
    found = find_models([folder]).build().state_dict()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["../other.safetensors", "/model.safetensors", "..", "a\0"])
def test_an_index_that_names_files_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    save("gpt2", tmp_path / "other")
    weights = safetensors.load_file(tmp_path / "other" / "model.safetensors")
    save("gpt2", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "other.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, name)}))
    assert refusal(tmp_path / "model") == f"{index} must name files in its folder, not {name!r}"


def test_weights_may_be_links_as_in_a_cache_of_models(tmp_path: Path) -> None:
    model = save("gpt2", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "blob")
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "blob")
    found = find_models([tmp_path / "model"]).build()
    assert torch.equal(found.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    "settings",
    [
        {"_attn_implementation": "someone/attention"},
        {"attn_implementation": {"": "someone/attention@main:forward"}},
        {"text_config": {"_attn_implementation_internal": "someone/attention"}},
    ],
)
def test_a_model_that_asks_for_code_of_a_repository_is_refused(tmp_path: Path, settings: dict[str, object]) -> None:
    save("gpt2", tmp_path)
    edit(tmp_path / "config.json", **settings)
    assert refusal(tmp_path).startswith(f"{tmp_path}/config.json asks for code of the repository someone/attention")


def test_a_model_that_brings_code_is_opened_without_it(tmp_path: Path) -> None:
    """`auto_map` names classes in a file of the folder, which transformers imports if it is told to trust them."""
    save("gpt2", tmp_path / "model")
    (tmp_path / "model" / "own.py").write_text(f"open({str(tmp_path / 'code was run')!r}, 'w')\n")
    edit(tmp_path / "model" / "config.json", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    edit(tmp_path / "model" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.T", "own.T"]})
    models = find_models([tmp_path / "model"])
    models.build()
    models.tokenizer()
    assert not (tmp_path / "code was run").exists()


@pytest.mark.parametrize(
    "settings", [{"peft_type": "XLORA", "adapters": {"0": "../other"}}, {"megatron_config": {"a": 1}}]
)
def test_an_adapter_that_names_others_or_code_is_refused(tmp_path: Path, settings: dict[str, object]) -> None:
    save("llama", tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "a")
    edit(tmp_path / "a" / "adapter_config.json", **settings)
    assert refusal(tmp_path / "a") == (
        f"{tmp_path}/a must be an adapter of its own weights, and name neither others nor code of Megatron"
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a run of documents and names that could break a page, and returns its folder."""
    folder = tmp_path_factory.mktemp("run")
    save_model(folder / "model")
    hostile = HOSTILE["end of script"] + HOSTILE["separators"] + "\" onload=alert(1) x='"
    rows = [{"text": f"{text} {hostile}", "id": hostile} for text in texts_of([9] * 4)]
    train = write(folder / "<img src=x onerror=alert(1)>.jsonl", rows)
    query = write(folder / "query.jsonl", [{"text": rows[0]["text"]}])
    succeed(folder / "model", "--train", train, "--query", query, "--out", folder / "out", *QUICK)
    return folder / "out"


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the texts of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found[-1:] and self.found[-1][0] == "script":
            self.scripts.append(data)


def test_a_page_of_hostile_documents_has_the_elements_of_any_page(run: Path, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", texts_of([9] * 4))
    words = ["--train", train, "--query", train, "--out", tmp_path / "out", *QUICK]
    succeed(run.parent / "model", *words)
    pages = [Elements((folder / "index.html").read_text(encoding="utf-8")) for folder in (run, tmp_path / "out")]
    hostile, plain = ([(tag, sorted(attributes)) for tag, attributes in page.found] for page in pages)
    assert hostile == plain
    assert not any(name.startswith("on") for _, names in hostile for name in names)
    policy = next(a["content"] for tag, a in pages[0].found if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    digests = {b64encode(hashlib.sha256(text.encode()).digest()).decode(): text for text in pages[0].scripts}
    (script,) = [digests[digest] for digest in allowed if digest in digests]
    assert script in pages[1].scripts  # nothing of a document is in the script that may run
    assert "\u2028" not in (run / "index.html").read_text(encoding="utf-8")
    assert "</script><script>" in json.dumps(page_data(run / "index.html"))


def test_a_run_that_hands_other_arguments_to_the_driver_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "out")
    content = json.loads((run / "run.json").read_text())
    for change in ({"projector": 1}, {"load_from_save_dir": False}):
        content["facts"]["arguments"] |= change
        (tmp_path / "out" / "run.json").write_text(json.dumps(content))
        result = call("--out", tmp_path / "out", "--ask", "ba be")
        assert (result.status, "run.json was written by another version" in result.err) == (2, True)


def test_a_run_is_deleted_without_what_links_in_it_lead_to(run: Path, tmp_path: Path) -> None:
    out, mine = tmp_path / "out", tmp_path / "mine"
    shutil.copytree(run, out)
    mine.mkdir()
    for name in ("top.jsonl", "index.html"):
        (mine / name).write_text("stays")
    (out / "link").symlink_to(mine)
    RunFolder(out, overwrite=True).delete_outdated()
    assert sorted(path.name for path in mine.iterdir()) == ["index.html", "top.jsonl"]
    assert not (out / "index.html").exists()


@pytest.mark.parametrize("name", ["..", "../x", "/tmp/x", "a/b", "a\\b", "a\0b", "", "a\n"])
def test_results_stay_in_the_folder_of_their_run(run: Path, name: str) -> None:
    result = call("--out", run, "--ask", "ba be", "--name", name)
    assert result.status == 2
    assert "--name must be letters" in result.err


@pytest.mark.parametrize("kind", ["model", "torch", "adapter"])
def test_no_run_reaches_for_the_network(tmp_path: Path, kind: str) -> None:
    """Also where weights are a file of torch.save, for which transformers looks for another on its hub."""
    folder = tmp_path / "model"
    save_model(folder, "llama")
    if kind == "torch":
        as_torch_file(folder, "model")
    if kind == "adapter":
        save_adapter(folder, tmp_path / "adapter")
        folder = tmp_path / "adapter"
    train = write(tmp_path / "train.jsonl", texts_of([9] * 4))
    program = [sys.executable, "-W", "ignore", ROOT / "tests/programs/lm_without_network.py"]
    words = [folder, "--train", train, "--query", train, "--out", tmp_path / "out", *QUICK]
    done = subprocess.run([str(word) for word in [*program, *words]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
