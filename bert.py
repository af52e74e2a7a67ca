"""
The text tower: the encoder half of the Transformer as BERT uses it (Devlin et al., 2019), in the sizes and
with the weights of Chinese RoBERTa-wwm-ext (Cui et al., 2020) or its 3-layer version RBT3. It has no pooler
and no language-model head: Chinese CLIP reads the last layer's [CLS] token (paper, sec. 2.1, app. A.2).

Compare with vit.py. BERT is post-norm: it normalises the sum after every addition. It has the exact GELU,
dropout in training, LayerNorm eps 1e-12, and separate q, k and v. Parameter names are the official ones.

Shapes: B batch, T tokens, D width, H heads. Token id 0 is padding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

PAD_ID = 0  # line 1 of assets/vocab.txt
LAYER_NORM_EPS = 1e-12  # BERT's; PyTorch's default is 1e-5


@dataclass(frozen=True)
class BertConfig:
    layers: int = 12
    width: int = 768  # D
    heads: int = 12  # the shapes of the weights do not reveal it, so `save` stores it
    vocab_size: int = 21128
    max_positions: int = 512
    token_types: int = 2  # sentence A and B; captions are always sentence A, row 0
    dropout: float = 0.1  # on hidden states and on attention, in training only


# ------------------------------------------------------------------------------------------------------------
# parts


class Embeddings(nn.Module):
    """ids [B, T] -> [B, T, D]: the normalised sum of word, position and sentence vectors."""

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
    """x [B, T, D], is_token [B, T] (False: padding) -> [B, n, D]: the first n tokens (all if None) attend
    to all T tokens that are not padding."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)

    def forward(self, x: torch.Tensor, is_token: torch.Tensor, n: int | None) -> torch.Tensor:
        q, k, v = self.query(x[:, :n]), self.key(x), self.value(x)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, H, n or T, D/H]
        # (q @ k.transpose(-2, -1) / math.sqrt(D/H)).masked_fill(~is_token, -inf).softmax(-1) @ v
        x = F.scaled_dot_product_attention(
            q, k, v, attn_mask=is_token[:, None, None, :], dropout_p=self.dropout if self.training else 0.0)
        return x.transpose(1, 2).flatten(2)  # [B, n, D]


class AddAndNorm(nn.Module):
    """Post-norm: LayerNorm(residual + dropout(linear(x))). Both halves of a layer end with it."""

    def __init__(self, in_width: int, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(in_width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(x)))


class Layer(nn.Module):
    """x [B, T, D] -> [B, n, D]. The nesting only gives the parameters their official names."""

    def __init__(self, config: BertConfig):
        super().__init__()
        D = config.width
        self.attention = nn.ModuleDict({"self": SelfAttention(config), "output": AddAndNorm(D, config)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(D, 4 * D)})
        self.output = AddAndNorm(4 * D, config)

    def forward(self, x: torch.Tensor, is_token: torch.Tensor, n: int | None = None) -> torch.Tensor:
        x = self.attention["output"](self.attention["self"](x, is_token, n), residual=x[:, :n])
        return self.output(F.gelu(self.intermediate["dense"](x)), residual=x)  # the exact GELU


# ------------------------------------------------------------------------------------------------------------
# the tower


class Encoder(nn.Module):
    """A stack of layers. Only [CLS] leaves the tower, so the last layer computes only this token (n = 1), as
    in vit.py. The plain loop is `for layer in self.layer: x = layer(x, is_token)`."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        """x [B, T, D], is_token [B, T] -> [CLS] [B, D]."""
        for i, layer in enumerate(self.layer):
            n = 1 if i == len(self.layer) - 1 else None
            if self.grad_checkpointing and self.training:  # keep the layer's input, recompute the rest
                x = checkpoint(layer, x, is_token, n, use_reentrant=False)
            else:
                x = layer(x, is_token, n)
        return x[:, 0]


class Bert(nn.Module):
    """ids [B, T] -> the [CLS] token after the last layer [B, D]."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.max_positions = config.max_positions
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.init_weights()

    def init_weights(self):
        """Random weights for training from scratch. BERT's own std, 0.02, is so small at widths far below 768
        that [CLS] ignores the other tokens for hundreds of steps; with width^-0.5 all widths behave alike.
        Positions start at a tenth of that, or it takes twice as long to learn which words there are."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.embeddings.word_embeddings.weight[PAD_ID])
        for table in (self.embeddings.position_embeddings, self.embeddings.token_type_embeddings):
            nn.init.normal_(table.weight, std=0.1 * table.weight.shape[1] ** -0.5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > self.max_positions:
            raise ValueError(f"{ids.shape[1]} tokens per caption, but positions end at {self.max_positions}")
        # Reading .max() from a GPU would wait for the GPU, so ids may stay on the CPU until they are cut.
        ids = cut_padding(ids).to(self.embeddings.word_embeddings.weight.device, non_blocking=True)  # [B, T]
        is_token = ids != PAD_ID  # [B, T]
        return self.encoder(self.embeddings(ids), is_token)  # [B, D]


def cut_padding(ids: torch.Tensor) -> torch.Tensor:
    """ids [B, T] -> [B, longest caption]. Columns that are padding in every caption change no feature, but a
    caption of ten characters is 12 tokens: the other 40 of 52 columns would be three quarters of the work."""
    used = (ids != PAD_ID).any(dim=0).nonzero()  # the columns that at least one caption uses
    return ids[:, : int(used.max()) + 1 if len(used) else 1]
