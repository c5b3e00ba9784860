"""Models and tokenizer batches of transformers: padding on the left, batches by name, sequence to sequence."""

import pytest
import torch
from libraries import needs
from torch import Tensor, nn

from trak_fast import HookGradientComputer
from trak_fast.gradients import FunctionalGradientComputer
from trak_fast.tasks import CausalLM, Seq2SeqLM, TextClassification, batch_tensors

needs("transformers")
import transformers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own

WORDS, LENGTH = 19, 6
BEFORE = [3, 0, 1]  # leading padding of three texts


def left_padded() -> tuple[Tensor, Tensor]:
    mask = (torch.arange(LENGTH) >= torch.tensor(BEFORE)[:, None]).long()
    return torch.where(mask > 0, torch.randint(3, WORDS, (3, LENGTH)), 0), mask


def gpt2() -> nn.Module:
    """A model that counts positions from the front, padding included."""
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=LENGTH, n_embd=8, n_layer=2, n_head=2, attn_implementation="eager"
    )
    return transformers.GPT2LMHeadModel(config).double().eval()


@pytest.mark.parametrize("computer", [FunctionalGradientComputer, HookGradientComputer])
@pytest.mark.parametrize("labelled", [False, True])
def test_gpt2_reads_texts_padded_on_the_left_as_texts_alone(
    computer: type[FunctionalGradientComputer], labelled: bool
) -> None:
    model = gpt2()
    ids, mask = left_padded()
    batch = transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask})
    if labelled:
        batch["labels"] = torch.where(torch.arange(LENGTH) > 3, ids, -100)
    gradients = computer(model, CausalLM())
    tensors = batch_tensors(batch, CausalLM())
    assert len(tensors) == (3 if labelled else 2)
    found = gradients.compute_per_sample_grad(tensors)
    for i, start in enumerate(BEFORE):
        labels = batch["labels"][i : i + 1, start:] if labelled else ids[i : i + 1, start:]
        logits = model(input_ids=ids[i : i + 1, start:]).logits
        loss = nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])  # transformers' own is in float32
        f = -loss - torch.log(-torch.expm1(-loss))
        slopes = torch.autograd.grad(f, list(model.parameters()))
        for (name, _), slope in zip(model.named_parameters(), slopes, strict=True):
            torch.testing.assert_close(found[name][i], slope, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_classifiers_with_and_without_token_types(kind: str) -> None:
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=WORDS, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
        model = transformers.BertForSequenceClassification(config)
    else:
        model = transformers.DistilBertForSequenceClassification(
            transformers.DistilBertConfig(vocab_size=WORDS, dim=8, n_layers=1, n_heads=2, hidden_dim=8)
        )
    model = model.double().eval()
    ids, mask = left_padded()
    named = {"input_ids": ids, "attention_mask": mask, "label": torch.tensor([1, 0, 1])}
    if kind == "bert":
        named["token_type_ids"] = torch.randint(2, ids.shape) * mask
    batch = batch_tensors(named, TextClassification())
    f = TextClassification().get_outputs(model, dict(model.named_parameters()), {}, batch)
    for i, start in enumerate(BEFORE):
        inputs = {name: x[i : i + 1, start:] for name, x in named.items() if name != "label"}
        p = torch.softmax(model(**inputs).logits, 1)[0, named["label"][i]]
        torch.testing.assert_close(f[i], torch.log(p / (1 - p)), rtol=1e-9, atol=1e-9)


def test_t5_predicts_its_labels() -> None:
    config = transformers.T5Config(
        vocab_size=WORDS, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).double().eval()
    ids, mask = left_padded()
    labels = torch.randint(1, WORDS, (3, 5))
    labels[0, 2:] = -100
    labels[1, :3] = -100  # padded on the left
    batch = batch_tensors({"labels": labels, "input_ids": ids, "attention_mask": mask}, Seq2SeqLM())
    found = HookGradientComputer(model, Seq2SeqLM()).compute_per_sample_grad(batch)
    parameters = dict(model.named_parameters())
    for i, start in enumerate(BEFORE):
        own = labels[i : i + 1][labels[i : i + 1] != -100][None]
        loss = model(input_ids=ids[i : i + 1, start:], labels=own).loss
        f = -loss - torch.log(-torch.expm1(-loss))
        slopes = torch.autograd.grad(f, list(parameters.values()), allow_unused=True)
        for name, slope in zip(parameters, slopes, strict=True):
            torch.testing.assert_close(found[name][i], slope, rtol=1e-8, atol=1e-11)
