"""
The text tower: the encoder half of the Transformer as BERT uses it (Devlin et al., 2019), in the size and
with the weights of Chinese RoBERTa-wwm-ext (Cui et al., 2020) or its 3-layer cut RBT3. No pooler, no
language-model head: Chinese CLIP reads the [CLS] token of the last layer (paper, sec. 2.1 and app. A.2).

Compare with vit.py: BERT is post-norm (the residual stream itself is normalised after every addition), uses
the exact GELU, dropout in training, LayerNorm eps 1e-12, and separate q, k, v matrices. Parameter names are
the official ones.

Shapes: B batch, T tokens, D width, H heads. Token id 0 is padding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

PAD_ID = 0  # line 1 of vocab.txt
LAYER_NORM_EPS = 1e-12  # BERT's, against PyTorch's 1e-5


@dataclass(frozen=True)
class BertConfig:
    layers: int = 12
    width: int = 768  # D
    heads: int = 12  # not readable from tensor shapes, so it travels with the weights
    vocab_size: int = 21128
    max_positions: int = 512
    token_types: int = 2  # sentence A and B; captions are always sentence A, row 0
    dropout: float = 0.1  # on hidden states and on attention, in training only


# ------------------------------------------------------------------------------------------------------------
# parts


class Embeddings(nn.Module):
    """ids [B, T] -> [B, T, D]: the sum of what the token is, where it stands and which sentence it is in,
    normalised."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.width, padding_idx=PAD_ID)
        self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.token_type_embeddings = nn.Embedding(config.token_types, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.word_embeddings(ids)  # [B, T, D]
        x = x + self.position_embeddings.weight[: ids.shape[1]] + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(x))


class SelfAttention(nn.Module):
    """x [B, T, D], pad_mask [B, T] (True where a token is real) -> [B, n, D]: the first n tokens ask (all if
    None)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)

    def forward(self, x: torch.Tensor, pad_mask: torch.Tensor, n: int | None) -> torch.Tensor:
        q, k, v = self.query(x[:, :n]), self.key(x), self.value(x)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, H, n or T, D/H]
        # softmax over real tokens only: (q @ k.transpose(-2, -1) / sqrt(D/H)).masked_fill(padding,
        # -inf).softmax(-1) @ v
        x = F.scaled_dot_product_attention(
            q, k, v, attn_mask=pad_mask[:, None, None, :], dropout_p=self.dropout if self.training else 0.0)
        return x.transpose(1, 2).flatten(2)  # [B, n, D]


class AddAndNorm(nn.Module):
    """Post-norm: LayerNorm(residual + dropout(linear(x))). BERT ends both halves of a layer with it."""

    def __init__(self, in_width: int, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(in_width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(x)))


class Layer(nn.Module):
    """x [B, T, D] -> [B, n, D]. The nesting (attention.self.query, intermediate.dense ...) only spells the
    official names."""

    def __init__(self, config: BertConfig):
        super().__init__()
        D = config.width
        self.attention = nn.ModuleDict({"self": SelfAttention(config), "output": AddAndNorm(D, config)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(D, 4 * D)})
        self.output = AddAndNorm(4 * D, config)

    def forward(self, x: torch.Tensor, pad_mask: torch.Tensor, n: int | None = None) -> torch.Tensor:
        x = self.attention["output"](self.attention["self"](x, pad_mask, n), residual=x[:, :n])
        # exact GELU, not vit.py's QuickGELU
        return self.output(F.gelu(self.intermediate["dense"](x)), residual=x)


# ------------------------------------------------------------------------------------------------------------
# the tower


class Encoder(nn.Module):
    """A stack of layers. Only [CLS] leaves the tower, so the last layer computes only that token."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor, pad_mask: torch.Tensor) -> torch.Tensor:
        """x [B, T, D], pad_mask [B, T] -> [CLS] [B, D]."""
        for i, layer in enumerate(self.layer):
            n = 1 if i == len(self.layer) - 1 else None
            # keep only the inputs of layers, recompute the rest in backward
            if self.grad_checkpointing and self.training:
                x = checkpoint(layer, x, pad_mask, n, use_reentrant=False)
            else:
                x = layer(x, pad_mask, n)
        return x[:, 0]


class Bert(nn.Module):
    """ids [B, T] -> the last layer's [CLS] token [B, D]."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.max_positions = config.max_positions
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.init_weights()

    def init_weights(self):
        """For training from scratch: matrices normal, biases and the padding row zero. BERT's std is 0.02,
        but at a width far below its 768 that leaves [CLS] deaf to the other tokens for hundreds of steps;
        width^-0.5 keeps the size of what a layer adds the same at any width."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.embeddings.word_embeddings.weight[PAD_ID])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > self.max_positions:
            raise ValueError(
                f"{ids.shape[1]} tokens a caption, but the position table ends at {self.max_positions}")
        # ids may wait on the CPU while the weights are on a GPU: there, looking at them interrupts nothing
        ids = cut_padding(ids).to(self.embeddings.word_embeddings.weight.device, non_blocking=True)  # [B, T]
        pad_mask = ids != PAD_ID  # [B, T]
        return self.encoder(self.embeddings(ids), pad_mask)  # [B, D]


def cut_padding(ids: torch.Tensor) -> torch.Tensor:
    """ids [B, T] -> [B, longest caption]: columns that are padding for every caption cannot change any
    feature, and a caption of ten characters is 12 tokens: in 52 columns it would spend three quarters of the
    work on padding."""
    used = (ids != PAD_ID).any(dim=0).nonzero()  # columns that at least one caption uses
    return ids[:, : int(used.max()) + 1 if len(used) else 1]
