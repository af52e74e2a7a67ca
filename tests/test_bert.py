"""bert.py against Hugging Face's BertModel, and what must hold for any BERT."""

import pytest
import torch
import transformers
from conftest import difference, shake

from bert import Bert, BertConfig, cut_padding

TINY = BertConfig(layers=3, width=48, heads=4, vocab_size=200, max_positions=40)


def tower(config: BertConfig = TINY) -> Bert:
    torch.manual_seed(0)
    return shake(Bert(config)).eval()


def captions(lengths: list[int], columns: int, seed: int = 0) -> torch.Tensor:
    """ids [B, columns]: captions of these lengths, padded on the right with 0."""
    ids = torch.randint(
        1, TINY.vocab_size, (len(lengths), columns), generator=torch.Generator().manual_seed(seed)
    )
    return ids.masked_fill(torch.arange(columns) >= torch.tensor(lengths)[:, None], 0)


def hugging_face(bert: Bert) -> transformers.BertModel:
    """The same sizes and the same tensors: names agree, so nothing may be missing or left over."""
    config = transformers.BertConfig(
        vocab_size=TINY.vocab_size,
        hidden_size=TINY.width,
        num_hidden_layers=TINY.layers,
        num_attention_heads=TINY.heads,
        intermediate_size=4 * TINY.width,
        max_position_embeddings=TINY.max_positions,
        hidden_act="gelu",
    )
    theirs = transformers.BertModel(config, add_pooling_layer=False).to(
        bert.embeddings.LayerNorm.weight.dtype
    )
    theirs.load_state_dict(bert.state_dict())
    return theirs.eval()


def test_padding_columns_are_cut_and_tokens_are_not():
    assert cut_padding(torch.tensor([[5, 6, 0, 0, 0], [5, 0, 7, 0, 0]])).tolist() == [[5, 6, 0], [5, 0, 7]]
    assert cut_padding(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 1)  # something is left of nothing


IDS = {
    "no padding": captions([9, 9, 9], 9),
    "mixed lengths": captions([9, 2, 5, 1], 9),
    "columns that nobody uses": captions([4, 7, 2], 30),
    "all positions": captions([40, 3], 40),
    "padding inside and in front": captions([9, 9], 9)
    * torch.tensor([[1, 1, 0, 1, 1, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 0]]),
}


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_cls_token_equals_hugging_face(ids, dtype, limit):
    bert = tower().to(dtype)
    with torch.no_grad():
        theirs = hugging_face(bert)(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state[:, 0]
        assert difference(bert(ids), theirs) < limit


def test_features_do_not_depend_on_the_padding():
    bert = tower().double()
    alone = torch.cat([bert(row[: int((row != 0).sum())][None]) for row in captions([3, 8, 5], 40)])
    for columns in (8, 9, 20, 40):
        assert difference(bert(captions([3, 8, 5], 40)[:, :columns]), alone) < 1e-12


def test_layers_see_no_column_that_is_padding_for_all():
    bert, widths = tower(), []
    bert.encoder.layer[0].register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    bert(captions([3, 8, 5], 40))
    assert widths == [8]


def test_more_tokens_than_positions_are_refused():
    assert tower()(captions([40], 40)).shape == (1, 48)
    with pytest.raises(ValueError, match="41 tokens.*positions end at 40"):
        tower()(captions([3], 41))


def test_dropout_acts_in_training_only():
    bert, ids = tower(), captions([9, 4], 9)
    assert torch.equal(bert(ids), bert(ids))
    bert.train()
    torch.manual_seed(0)
    first, second = bert(ids), bert(ids)
    torch.manual_seed(0)
    again = bert(ids)
    assert difference(first, second) > 1e-3 and torch.equal(first, again)


def test_dropout_acts_on_attention_too():
    bert, ids = tower().train(), captions([9, 4], 9)
    for module in bert.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.manual_seed(0)
    assert difference(bert(ids), bert(ids)) > 1e-3


def test_dropout_acts_on_embeddings_too():
    bert, ids = tower().train(), captions([9, 4], 9)
    bert.encoder.eval()
    torch.manual_seed(0)
    assert difference(bert(ids), bert(ids)) > 1e-3


def test_no_dropout_in_training_equals_eval():
    bert, ids = (
        tower(BertConfig(3, 48, 4, vocab_size=200, max_positions=40, dropout=0.0)),
        captions([9, 4], 9),
    )
    assert torch.equal(bert(ids), bert.train()(ids))


def gradients(bert: Bert, ids: torch.Tensor, checkpointing: bool) -> list[torch.Tensor]:
    bert.encoder.grad_checkpointing = checkpointing
    bert.zero_grad()
    torch.manual_seed(0)
    bert(ids).pow(2).sum().backward()
    return [p.grad.clone() for p in bert.parameters()]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_grad_checkpointing_gives_the_same_gradients(
    dropout,
):  # under dropout too: the same masks are drawn again
    config = BertConfig(3, 48, 4, vocab_size=200, max_positions=40, dropout=dropout)
    bert, ids = tower(config).double().train(), captions([9, 4], 12)
    for a, b in zip(gradients(bert, ids, True), gradients(bert, ids, False), strict=True):
        assert (
            a - b
        ).norm() <= 1e-10 * b.norm() + 1e-12  # some are zero but for rounding: a key's bias moves no softmax


def test_padding_token_learns_nothing():
    bert, ids = tower(), captions([9, 4], 12)
    bert(ids).sum().backward()
    assert not bert.embeddings.word_embeddings.weight.grad[0].any()
