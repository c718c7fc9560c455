"""Memory of one GPU, by what it holds and at the moment that needs most.

What stays for the whole stage (t trained, f frozen parameters, n GPUs; bf16, bytes):

    engine   weights                 gradients          AdamW        besides
    ddp      4 t + 2 f               4 t, twice if n>1  8 t          autocast's bf16 copies of trained matrices
    zero2    2 t + 2 f               2 t / n            12 t / n     gradients of one block before they are shared out
    zero3    (2 t + 2 f) / n         2 t / n            12 t / n     up to 10^9 gathered parameters
    fsdp2    (4 t + 2 f) / n         4 t / n            8 t / n      two gathered blocks and their gradients, and what
                                                                     is outside the blocks, all in bf16

DDP keeps gradients a second time in its buckets. DeepSpeed's AdamW holds a float32 copy of the weights. One process
needs no engine: it is ddp without buckets. In fp32, 2 becomes 4 and nothing is copied. 4-bit weights take half a byte
and 1/64 of it for their scales (float32 per 64 weights, themselves quantised), 8-bit ones a byte.

On top come, in turn, (1) the end of the forward pass: what the backward pass will need, all copies, three versions of
the logits; (2) the backward pass of the loss: four bytes of logits three times; (3) the backward pass of a block. The
largest counts. Activations are those of a micro batch of the longest samples, all of whose text is supervised; logits
are those of a chunk, or of all positions where `cross_entropy` is "plain".

Of a block like Llama's (D width, F of the MLP, Q of all query heads, K of all key-value heads, h heads) autograd keeps
so many bytes per token, which a test holds against those that it really saves:

    float32 weights under autocast    26 D + 4 Q + 4 K + 8 F + 4 h    the sum of residuals is float32, and every linear
                                                                      layer keeps a bf16 copy of its input
    bf16 weights that learn           16 D + 4 Q + 4 K + 8 F + 4 h    FSDP2's and DeepSpeed's mixed precision
    bf16 weights, frozen               8 D + 4 Q + 4 K + 6 F + 4 h    inputs of linear layers are not needed
    float32 throughout                24 D + 8 Q + 8 K + 16 F + 4 h
    a LoRA adapter, besides            2 W + W (dropout) + 2 r        W what it reads, r its rank; it computes in bf16

With checkpointing only each block's input stays, and one block at a time is computed again. With selective
checkpointing the results of linear layers and attention stay, too (s bytes a number: 2, in fp32 4):

    besides the block's input         s (2 D + 2 Q + 2 K + 2 F) + 4 h     and s (W' + r) of an adapter that writes W'

of which the block that is computed again shares s (Q + K + 2 F) + 4 h.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from integrations.llava.config import StageConfig
from integrations.llava.modeling import LOSS_CHUNK

from .facts import Block, ModelFacts

__all__ = [
    "GIB",
    "RESERVE",
    "SLACK",
    "Memory",
    "Weights",
    "block_bytes",
    "engines_for",
    "estimate_memory",
    "residual_bytes",
    "selected_bytes",
]

GIB = 2**30
RESERVE = 1.0
"""GiB for the CUDA context, libraries and communication."""
SLACK = 0.05
"""Share that the allocator loses between tensors."""

_LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters

Weights = Literal["autocast", "bf16", "fp32"]
"""How trained weights enter the computation: float32 under autocast, bf16 copies of an engine, or plain float32."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Attributes:
        engine: how the GPUs share the run.
        num_gpus: how many.
        micro_batch: samples at a time.
        accumulation: micro batches a step.
        weights: parameters as they are stored.
        gradients: of trained parameters, buckets included.
        optimizer: AdamW's states.
        activations: what the backward pass needs of fuser, projector and language model.
        logits: of the language model, and what the loss makes of them.
        copies: weights in the computing precision, gathered or cast, and gradients on their way.
        peak: the largest moment; less than the sum, as not everything is there at once.
    """

    engine: str
    num_gpus: int
    micro_batch: int
    accumulation: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    copies: float
    peak: float

    def fits(self, memory: float) -> str:
        """Whether it fits a GPU of so many GiB: "yes"; "tight" if only without the allocator's slack; "no"."""
        need = self.peak / GIB + RESERVE
        if need > memory:
            return "no"
        return "yes" if need + SLACK * self.peak / GIB <= memory else "tight"


def engines_for(config: StageConfig, num_gpus: int) -> tuple[str, ...]:
    """Name the engines that can run a stage on so many GPUs; quantised weights cannot be taken apart."""
    if num_gpus == 1:
        return ("ddp",)
    return ("ddp", "zero2") if config.lora.quantize != "none" else ("ddp", "zero2", "zero3", "fsdp2")


def estimate_memory(facts: ModelFacts, config: StageConfig, *, engine: str, num_gpus: int, longest: int) -> Memory:
    """Estimate the memory of one GPU while a stage runs.

    Args:
        facts: of the model.
        config: of the stage.
        engine: name from `ENGINES`, in place of the stage's own.
        num_gpus: how many share the run.
        longest: tokens of the longest sample, images included.

    Raises:
        ValueError: if `batch_size` cannot be divided among so many GPUs.
    """
    micro_batch, accumulation = config.batches(num_gpus)
    weights: Weights = "fp32" if config.precision == "fp32" else "autocast" if engine == "ddp" else "bf16"
    stored, gradients, optimizer, copies, first_gradients = _held(facts, config, engine, num_gpus)
    tokens = micro_batch * longest
    chunked = replace(config, engine=engine).logits_in_chunks  # type: ignore[arg-type]  # a name from `ENGINES`
    logits = (min(tokens, LOSS_CHUNK) if chunked else tokens) * facts.vocabulary
    size = 4 if weights == "fp32" else 2
    residual = tokens * residual_bytes(facts.block, weights)
    # Behind the blocks: what the final norm read and made, and the output layer's copy of it, or of its labelled rows.
    read = residual if chunked else tokens * size * facts.block.hidden
    connector = micro_batch * facts.connector_bytes + 2 * residual + read
    one_block = tokens * block_bytes(facts.block, weights, dropout=config.lora.dropout > 0)
    if config.gradient_checkpointing:
        kept, again = connector + facts.num_blocks * residual, one_block
        if config.gradient_checkpointing == "selective":
            selected, shared = selected_bytes(facts.block, weights)
            kept, again = kept + facts.num_blocks * tokens * selected, again - tokens * shared
    else:
        kept, again = connector + facts.num_blocks * one_block, 0
    earlier = gradients if accumulation > 1 else first_gradients
    always = stored + optimizer
    at_loss = (size + 8) * logits
    # An engine's copies stay. With checkpointing, only two of autocast's do: the output layer's, the block's at work.
    fleeting = engine == "ddp" and config.gradient_checkpointing is not False
    tail = min(copies, size * facts.tail) if fleeting else copies
    at_work = min(copies, size * facts.block.trained) if fleeting else copies
    moments = (
        always + earlier + kept + copies + at_loss,
        always + earlier + kept + tail + 12 * logits,
        always + earlier + kept + again + at_work,
        always + gradients + connector + again + at_work,
        always + gradients + (4 * facts.num_trained / num_gpus if engine == "zero2" else 0),
    )
    return Memory(
        engine=engine,
        num_gpus=num_gpus,
        micro_batch=micro_batch,
        accumulation=accumulation,
        weights=stored,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept + again,
        logits=max(at_loss, 12 * logits),
        copies=copies,
        peak=max(moments),
    )


def _held(
    facts: ModelFacts, config: StageConfig, engine: str, num_gpus: int
) -> tuple[float, float, float, float, float]:
    """Bytes from the second step on: weights, gradients, states, copies, gradients before the first backward pass."""
    trained, block, full = facts.num_trained, facts.block, config.precision == "fp32"
    size = 4 if full else 2
    stored = {"none": float(size), "int8": 1.0, "nf4": 0.5 * (1 + 1 / 32 + 1 / 2048)}[config.lora.quantize]
    frozen = size * (facts.num_frozen - facts.quantized) + stored * facts.quantized
    if engine == "ddp":
        buckets = 4 * trained if num_gpus > 1 else 0
        copies = 0 if full else 2 * facts.matrices
        return 4 * trained + frozen, 4 * trained + buckets, 8 * trained, copies, buckets
    if engine == "fsdp2":
        one_block = block.trained + block.frozen
        outside = trained + facts.num_frozen - facts.num_blocks * one_block
        gathered = size * outside + 2 * size * (one_block + block.trained)
        return (4 * trained + frozen) / num_gpus, 4 * trained / num_gpus, 8 * trained / num_gpus, gathered, 0
    gradients, states = size * trained / num_gpus, (8 if full else 12) * trained / num_gpus
    if engine == "zero2":
        return size * trained + frozen, gradients, states, size * block.trained, 0
    gathered = size * min(_LIVE_PARAMETERS, trained + facts.num_frozen)
    return (size * trained + frozen) / num_gpus, gradients, states, gathered, 0


def residual_bytes(block: Block, weights: Weights) -> int:
    """Bytes of one token between two blocks: 4 D or 2 D, as the embedding, which autocast leaves alone, has it."""
    wide = weights == "fp32" or (weights == "autocast" and _learns(block))
    return block.hidden * (4 if wide else 2)


def block_bytes(block: Block, weights: Weights, *, dropout: bool = False) -> int:
    """Bytes that a block saves for its backward pass, per token, without weights; LoRA adapters may have dropout."""
    width, mlp, attention = block.hidden, block.intermediate, block.queries + block.keys
    if weights == "fp32":
        saved = 24 * width + 8 * attention + 16 * mlp if _learns(block) else 8 * width + 8 * attention + 12 * mlp
    elif not _learns(block):
        saved = 8 * width + 4 * attention + 6 * mlp
    else:
        saved = (26 if weights == "autocast" else 16) * width + 4 * attention + 8 * mlp
    size = 4 if weights == "fp32" else 2
    for read, _, rank in block.adapters:
        saved += (size + dropout) * read + size * rank
    statistics = 4 * block.heads + 2 * 4
    return saved + statistics


def selected_bytes(block: Block, weights: Weights) -> tuple[int, int]:
    """Bytes that a block's linear layers and attention put out, per token; and those that its backward reads."""
    size, attention = 4 if weights == "fp32" else 2, block.queries + block.keys
    statistics = 4 * block.heads
    kept = size * 2 * (block.hidden + attention + block.intermediate) + statistics
    kept += sum(size * (written + rank) for _, written, rank in block.adapters)
    return kept, size * (attention + 2 * block.intermediate) + statistics


def _learns(block: Block) -> bool:
    """Tell whether the block's own weights learn, not only adapters."""
    return block.trained > 0 and not block.adapters
