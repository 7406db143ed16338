"""The values that cross rooms and processes. Frozen structs, no behaviour beyond derived numbers.

Everything from `LoadModel` down travels between the engine and a worker as one msgpack frame: four
bytes of length (unsigned, big-endian), then the tagged struct. A worker executes frames strictly in
the order in which they arrive, so a block that one plan frees may be given out by the next.
"""

from __future__ import annotations

from typing import Literal

import msgspec

BLOCK_TOKENS = 16
"""Tokens in one KV block."""

FinishReason = Literal["stop", "length", "abort", "error", "timeout", "excluded"]
"""excluded: the request's own fields leave no token that may follow."""


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """The texts that an output may be. Checked by `grammar.check` before it gets here."""

    kind: Literal["json_schema", "regex", "lark", "gbnf"]
    """json_schema: `source` is the schema as JSON; regex: the whole output matches it, in Rust's
    syntax; lark: in llguidance's dialect, which can hold schemas and special tokens too; gbnf:
    llama.cpp's."""
    source: str


class SamplingParams(msgspec.Struct, frozen=True, array_like=True):
    """How to choose tokens. Validated by the server; the rest may trust the ranges stated here."""

    max_tokens: int
    """Most tokens to generate, >= 1: the server resolves an absent value to the context's end."""
    seed: int = 0
    """64-bit, always set; drawn at random by the server when the caller gives none."""
    temperature: float = 1.0
    """>= 0; 0 is greedy."""
    top_p: float = 1.0
    """(0, 1]"""
    top_k: int = 0
    """>= 0; 0 is off."""
    min_p: float = 0.0
    """[0, 1]"""
    repetition_penalty: float = 1.0
    """> 0; over prompt and output (CTRL, Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """[-2, 2]; over output only."""
    frequency_penalty: float = 0.0
    """[-2, 2]; over output only."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, added to its logit), each id inside the vocabulary."""
    min_tokens: int = 0
    """No stop token may be sampled before this many output tokens; <= max_tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Sampling one of these ends the sequence with "stop": the model's EOS ids (unless ignore_eos
    was asked for) and the caller's own, merged by the server."""
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences whose last token is masked when the output ends in what comes before it."""
    logprobs: int | None = None
    """None: none; k: the chosen token's and the k most likely ones', of the raw distribution."""
    prompt_logprobs: int | None = None
    """The same for each prompt token but the first."""
    grammar: Grammar | None = None
    """Only tokens that it allows; stop tokens of the model only where it is satisfied. It ends the
    sequence where nothing can follow, also before min_tokens and without any stop token."""


class Request(msgspec.Struct, frozen=True):
    """What one caller asked for; one per choice (n = 3 is three requests)."""

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0
    """Smaller runs first."""
    arrival: float = 0.0
    """Seconds of the engine's monotonic clock."""
    caller: str = ""
    """Whose API key, for fairness; empty when there are no keys."""
    cache_salt: str = ""
    """KV blocks are shared only between requests of one salt."""
    deadline: float | None = None
    """On the same clock; later than this nobody wants the answer."""
    timeout: float | None = None
    """What the caller asked for, in seconds, when there is a deadline. It began when the request
    came in, before a wait for the model to load, which `arrival` does not count."""
    is_batch: bool = False
    """A line of a batch: it gives way to everybody who waits for an answer."""
    mark: str = ""
    """The response or conversation that it is a part of: what it leaves in the KV cache goes with
    that one."""
    second: int | None = None
    """Of a pair of texts: from this position on the tokens are of BERT's token type 1."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The k most likely (token, logprob), most likely first."""


class TokenEvent(msgspec.Struct, frozen=True, gc=False):
    """What a stream delivers: tokens since the last event, in order; the last one has a reason."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    """As many as `tokens` when asked for, else empty."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    """In the first event only, one per prompt token (None for the first), when asked for."""
    finish_reason: FinishReason | None = None
    error: str | None = None
    """Why, when finish_reason is "error", "timeout" or "excluded"."""
    num_cached_tokens: int = 0
    """Prompt tokens that were not computed because their blocks were there."""
    complete: bool = False
    """With "stop": the grammar is complete, so the last token is text and no stop token."""


# --- between engine and worker -------------------------------------------------------------------


class LoadModel(msgspec.Struct, frozen=True, tag="load"):
    """The first frame to a worker, once."""

    name: str
    path: str
    dtype: str = "auto"
    """auto | bfloat16 | float16 | float32"""
    quantization: str = "auto"
    max_context: int | None = None
    """None: what the checkpoint says."""
    kv_bytes: int | None = None
    """Budget for KV blocks; None: the worker decides from what the machine has."""
    kv_dtype: str = "auto"
    """auto (as activations) | e4m3"""
    host_kv_bytes: int = 0
    """Budget of the host pool, to which blocks spill; 0: there is none."""
    disk_kv_path: str | None = None
    """Folder of the blocks on disk; None: there are none. Needs a host pool."""
    disk_kv_bytes: int = 0
    """Most bytes of files in that folder, also of other models that were here before."""
    load_format: str = "auto"
    """auto | dummy (random weights of the shapes in config.json)"""
    device: str = "auto"
    threads: int | None = None
    """Compute threads; None: physical cores."""
    task: str = "auto"
    """auto (what the checkpoint is for) | generate | embed | rerank"""
    pooling: str = "auto"
    """auto (as the checkpoint says) | mean | cls | last"""
    matryoshka: bool = False
    """Embeddings may be cut although the checkpoint does not say so."""
    token_budget: int = 2048
    """No step will have more tokens, but for a prompt that is computed whole."""
    max_running: int = 64
    """Nor more sequences."""


class LoadProgress(msgspec.Struct, frozen=True, tag="progress"):
    stage: str
    done_bytes: int
    total_bytes: int


class Pooling(msgspec.Struct, frozen=True):
    """Of a model that gives one vector for each prompt instead of generating."""

    task: Literal["embed", "rerank"]
    size: int
    """Numbers in a vector; 1 for a reranker: the score, in [0, 1]."""
    normalized: bool = False
    """Vectors have the length 1."""
    whole: bool = False
    """A prompt is computed in one step, because its first token sees its last, or because all of
    its hidden states are needed."""
    matryoshka: bool = False
    """The beginning of a vector is a vector too, of fewer dimensions."""
    dimensions: tuple[int, ...] = ()
    """To which lengths a vector may be cut; empty, with matryoshka: to any."""


class ModelInfo(msgspec.Struct, frozen=True, tag="loaded"):
    """The model is in memory and can run."""

    architecture: str
    num_parameters: int
    weight_bytes: int
    vocab_size: int
    max_context: int
    dtype: str
    device: str
    block_bytes: int
    """Bytes of one KV block over all layers."""
    num_blocks: int
    """The pool's budget in blocks: so many may be in use at once."""
    seconds: float
    quantizers: tuple[tuple[str, int], ...] = ()
    """(quantizer, how many layers it took)"""
    notes: tuple[str, ...] = ()
    """What a user should know, e.g. that a fast route is missing."""
    max_blocks: int = 0
    """Block ids are in [0, max_blocks); the budget may be raised to it at run time. 0: it is
    num_blocks."""
    num_host_blocks: int = 0
    """Places in the host pool, each for one block; their ids are in [0, num_host_blocks)."""
    kv_revision: str = ""
    """A digest of all that decides what a KV block holds beside its tokens: the weights, their
    formats, the dtype, the rope settings, the kernels. Blocks of two revisions never mix."""
    window: int = 0
    """Keys that a row sees in layers with a sliding window, at most; 0: there is no such layer."""
    window_share: float = 0.0
    """The part of a block's bytes that is theirs and can be given up alone; 0: none can."""
    pooling: Pooling | None = None
    """None: it generates."""


class WorkerFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The worker's last frame before it exits by itself."""

    reason: str
    refused: bool = False
    """True: the checkpoint is not understood, loading again cannot help."""


class NewSequence(msgspec.Struct, frozen=True, array_like=True):
    """A sequence the worker has not seen, or one that comes back after preemption."""

    seq: int
    tokens: tuple[int, ...]
    """All that is known: the prompt, and after preemption also the output so far."""
    num_prompt_tokens: int
    sampling: SamplingParams
    second: int | None = None
    """See `Request.second`."""


class Chunk(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Compute positions [start, stop) of one sequence.

    The tokens are the worker's own copy: it appends each token that it samples, so a decode is
    [n, n + 1) with nothing sent. `blocks` are appended to the worker's copy of the block table
    before the chunk runs. With `sample`, the logits of position stop - 1 give the token at `stop`.
    """

    seq: int
    start: int
    stop: int
    blocks: tuple[int, ...] = ()
    sample: bool = False


class BlockCopy(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Copy one block's bytes over all layers, or give some up. In a plan they happen one after
    another in order, before any chunk runs; what a chunk of an earlier plan wrote is complete."""

    kind: Literal["cow", "spill", "fetch", "trim"]
    """cow: block to block; spill: block `src` to host place `dst`; fetch: host place `src` to
    block `dst`; trim: nothing is copied, the bytes of `src` in layers with a window are given up
    until it is written again."""
    src: int
    dst: int


class Rebind(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Entry `index` of a sequence's block table becomes `block`, which holds the same bytes."""

    seq: int
    index: int
    block: int


class DiskOp(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One block between the host pool and a file. Begun after the plan's copies, executed in order
    on a thread of its own; each write and read is answered by a `DiskDone`, at any later time.
    Until then the host place belongs to it."""

    kind: Literal["write", "read", "remove"]
    key: bytes
    """32 bytes; the file's name. Names the namespace, this block's tokens and all before them."""
    place: int = -1
    """Host place; -1 for "remove"."""


class StepPlan(msgspec.Struct, frozen=True, tag="plan"):
    """One step. Applied in this order: drop, add, rebinds, copies, chunks."""

    step: int
    chunks: tuple[Chunk, ...]
    add: tuple[NewSequence, ...] = ()
    drop: tuple[int, ...] = ()
    """Sequences that finished, were aborted or preempted: the worker forgets them."""
    copies: tuple[BlockCopy, ...] = ()
    rebinds: tuple[Rebind, ...] = ()
    disk: tuple[DiskOp, ...] = ()


class TokenTable(msgspec.Struct, frozen=True, tag="tokens"):
    """What grammars need to know of the tokenizer. Once, before the first `CompileGrammar`; not
    answered."""

    pieces: tuple[bytes, ...]
    """The bytes of each token of the model's vocabulary; empty: it stands for nothing."""
    special: tuple[int, ...]
    """Those that are no text: grammars reach them by name only."""
    eos: tuple[int, ...]
    """The model's ends: allowed where the grammar is satisfied."""


class CompileGrammar(msgspec.Struct, frozen=True, tag="grammar"):
    """Make a grammar ready, beside the steps; answered by `GrammarCompiled` at any later time. A
    sequence may use a grammar without it, but then its first step may wait for the compiler."""

    id: int
    grammar: Grammar


class ReleaseMemory(msgspec.Struct, frozen=True, tag="release"):
    """Give the system the memory under these half-open ranges of block ids, whose bytes nobody
    needs; not answered. Written again they cost memory again."""

    blocks: tuple[tuple[int, int], ...]


class Sampled(msgspec.Struct, frozen=True, array_like=True, gc=False):
    seq: int
    token: int
    logprob: TokenLogprob | None = None
    error: str | None = None
    """The sequence cannot go on (its logits were not finite); `token` means nothing then."""
    complete: bool = False
    """The sequence ends with `token`, which is text: its grammar lets nothing follow."""
    vector: bytes | None = None
    """What a model with `ModelInfo.pooling` gives, as little-endian float32; `token` is 0."""
    is_excluded: bool = False
    """With `error`: it is the request's own fields that leave no token."""


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """For the prompt tokens at positions [start, start + len(entries))."""

    seq: int
    start: int
    entries: tuple[TokenLogprob, ...]


class StepResult(msgspec.Struct, frozen=True, tag="result"):
    step: int
    sampled: tuple[Sampled, ...]
    """One per chunk with `sample`, in the plan's order."""
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    seconds: float = 0.0
    """All of it, copies included."""
    copy_seconds: float = 0.0
    """Of `seconds`, spent in spills and fetches. On a GPU, for which they kept it from computing:
    most of a spill goes on beside the step."""
    num_masks: int = 0
    """Tokens that were sampled under a grammar."""
    mask_seconds: float = 0.0
    """What their masks took, on a thread beside the model."""
    mask_wait_seconds: float = 0.0
    """Of `seconds`, waited for them."""


class GrammarCompiled(msgspec.Struct, frozen=True, tag="compiled"):
    """The answer to `CompileGrammar`."""

    id: int
    error: str | None = None
    """Why it cannot be used."""


class DiskDone(msgspec.Struct, frozen=True, tag="disk"):
    """A write or read has ended. A file that is not what its name says has been removed."""

    kind: Literal["write", "read"]
    key: bytes
    error: str | None = None
    seconds: float = 0.0


class DiskIndex(msgspec.Struct, frozen=True, tag="disk_index"):
    """What the folder held when the model was loaded, least recently used first; once, right after
    `ModelInfo` and only with a disk tier."""

    keys: tuple[bytes, ...]
    file_bytes: int
    """Of one file; all of a model's have one size."""


ToWorker = LoadModel | StepPlan | ReleaseMemory | TokenTable | CompileGrammar
FromWorker = (
    LoadProgress | ModelInfo | WorkerFailed | StepResult | DiskDone | DiskIndex | GrammarCompiled
)
