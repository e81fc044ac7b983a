"""``Engine``: what a compile made, loaded and ready to run, whichever runtime it is for."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zqfp_compile.backends.ort_session import OrtSession
from zqfp_compile.backends.profiles import position_limit
from zqfp_compile.backends.session import Session
from zqfp_compile.backends.trt_session import TrtSession
from zqfp_compile.calibrate.causal_lm import CausalLm, InputSpec
from zqfp_compile.calibrate.samples import load_tokenizer, tokenizer_errors
from zqfp_compile.device import CUDA_PROVIDERS, providers_for, torch_device
from zqfp_compile.errors import UsageError
from zqfp_compile.output_folder import CONFIG, GENERATION_CONFIG, TOKENIZER
from zqfp_compile.runtime.chat import chat_prompt
from zqfp_compile.runtime.decoding import causal_lm, generate_tokens
from zqfp_compile.runtime.folder import ModelFolder
from zqfp_compile.runtime.sampling import Sampling
from zqfp_compile.runtime.text import decode_stream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GREEDY = Sampling()
_DEVICES = ("auto", "cpu", "cuda")


class Engine:
    """A loaded model: :meth:`run` for arrays, :meth:`generate` for text.

    Attributes:
        path: The file that runs.
        inputs: Name, element type and dimensions of every input; one that varies is a name or ``None``.
        outputs: The same of every output.
        device: Where it runs, ``cpu`` or ``cuda``.
    """

    def __init__(self, session: Session, folder: ModelFolder) -> None:
        """Use :meth:`load`."""
        self._session = session
        self._folder = folder
        self.path: Path = session.path
        self.inputs: tuple[InputSpec, ...] = session.inputs
        self.outputs: tuple[InputSpec, ...] = session.outputs
        self.device: str = session.device

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto") -> Engine:
        """Load a compiled folder, the folder of an ONNX model, or one file of either.

        Every file of a compiled folder that is used is first compared with ``manifest.json``. An engine is an
        executable: load only your own.

        Args:
            path: The folder or file.
            device: ``cuda`` takes the TensorRT or TensorRT-RTX engine, else ONNX Runtime's CUDA provider;
                ``cpu`` takes ``onnxruntime.onnx``, else ``model.zqfp.onnx``, which opens in more time and
                memory; ``auto`` is ``cuda`` where torch finds a GPU.

        Raises:
            UsageError: When there is nothing to load at ``path``.
            ModelError: When a file has changed since the compile, or cannot be loaded.
            MissingDependencyError: When the runtime or the GPU is missing.
        """
        if device not in _DEVICES:
            raise UsageError(f"--device {device}: is not one of {', '.join(_DEVICES)}")
        folder = ModelFolder.of(Path(path))
        return cls(_open(folder, device), folder)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run once.

        Inputs that lie on :attr:`device` are not copied, nor are the outputs: a KV cache that goes back in as
        it came out costs nothing.

        Args:
            inputs: An array for every input: numpy, torch, or anything with ``__dlpack__``. FP8 and bfloat16
                are ``ml_dtypes``' types in numpy and torch's own in torch.

        Returns:
            Every output by name: torch tensors on :attr:`device` when an input is a torch tensor, else numpy
            arrays.

        Raises:
            UsageError: When an input is missing, unknown, or of another type or shape.
            ModelError: When the model fails.
        """
        session = self._session
        named = {spec.name for spec in self.inputs}
        if named != inputs.keys():
            odd = sorted(named ^ inputs.keys())[0]
            what = "is missing" if odd in named else "is unknown"
            raise UsageError(f"{self.path}: input {odd!r} {what}; it takes {', '.join(sorted(named))}")
        values = {spec.name: session.take(spec, inputs[spec.name]) for spec in self.inputs}
        results = session.execute(values, [spec.name for spec in self.outputs])
        in_torch = any(isinstance(array, torch.Tensor) for array in inputs.values())
        read = session.to_torch if in_torch else session.to_numpy
        return {spec.name: read(spec, results[spec.name]) for spec in self.outputs}

    def generate(
        self, prompt: str, *, chat: bool = False, max_new_tokens: int = 256, sampling: Sampling = GREEDY
    ) -> Iterator[str]:
        """Continue a text; the pieces come as they are made, ``"".join`` of them is the whole.

        Args:
            prompt: What to continue; with ``chat`` what to answer.
            chat: Put the prompt into the model's chat template.
            max_new_tokens: See :meth:`generate_tokens`.
            sampling: How tokens are chosen, greedily when left out.

        Raises:
            UsageError: When the prompt does not fit, or the model has no tokenizer or chat template.
            ModelError: When the model, the tokenizer or the template fails.
        """
        tokens = self.encode(prompt, chat=chat)
        made = self.generate_tokens(tokens, max_new_tokens=max_new_tokens, sampling=sampling)
        return decode_stream(self.tokenizer, made)

    def generate_tokens(
        self, prompt: Sequence[int], *, max_new_tokens: int = 256, sampling: Sampling = GREEDY
    ) -> Iterator[int]:
        """Continue a text of token numbers, as transformers' ``generate`` does.

        It ends after a token that ``generation_config.json`` (else ``config.json``) calls the end, after
        ``max_new_tokens``, or when the context that ``config.json`` names is full.
        Nothing else of ``generation_config.json`` is used, no penalty for repetition either.

        Raises:
            UsageError: When the prompt is empty, too long, or holds a token that the model does not know.
            ModelError: When the model fails.
        """
        interface = self._causal_lm
        config = self._folder.read_json(CONFIG)
        room = (position_limit(self._folder.path) or sys.maxsize) - len(prompt)
        if not prompt or room < 1:
            raise UsageError(f"the prompt has {len(prompt)} tokens; give 1 to {room + len(prompt) - 1}")
        last = (interface.vocab_size or sys.maxsize) - 1
        if not all(0 <= token <= last for token in prompt):
            raise UsageError(f"{self.path}: knows tokens 0 to {last}; use its own tokenizer")
        tokens = generate_tokens(self._session, interface, prompt, sampling.picker())
        return _until_end(
            itertools.islice(tokens, max(0, min(max_new_tokens, room))),
            _end_tokens(self._folder.read_json(GENERATION_CONFIG)) or _end_tokens(config),
        )

    def encode(self, prompt: str, *, chat: bool = False) -> list[int]:
        """Return the token numbers of a prompt, in the model's chat template when ``chat``.

        Raises:
            UsageError: When the model has no tokenizer or chat template, or the tokenizer fails on the text.
        """
        text = chat_prompt(self._folder, prompt) if chat else prompt
        tokenizer = self.tokenizer
        with tokenizer_errors(self._folder.path / TOKENIZER):
            # A template writes its special tokens out.
            ids: list[int] = tokenizer.encode(text, add_special_tokens=not chat).ids
        return ids

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's ``tokenizers.Tokenizer``.

        Raises:
            UsageError: When there is no ``tokenizer.json``, or the file is none.
        """
        path = self._folder.companion(TOKENIZER)
        if path is None:
            raise UsageError(
                f"{self._folder.path}: text needs a tokenizer; put the model's {TOKENIZER} beside it "
                "before compiling it"
            )
        return load_tokenizer(path)

    @cached_property
    def _causal_lm(self) -> CausalLm:
        return causal_lm(self._session)


def _open(folder: ModelFolder, device: str) -> Session:
    names_engine = folder.file is not None and not folder.file.endswith(".onnx")
    if names_engine or device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        engine = folder.engine()
        if engine is not None:
            return TrtSession(engine)
    model = folder.onnx_model()
    found = torch_device(device)  # a missing GPU is said here
    return OrtSession(model, CUDA_PROVIDERS if device == "cuda" else providers_for(found))


def _until_end(tokens: Iterator[int], end: frozenset[int]) -> Iterator[int]:
    for token in tokens:
        yield token
        if token in end:
            return


def _end_tokens(config: Mapping[str, Any]) -> frozenset[int]:
    """A number or a list of them; anything else ends nothing."""
    found = config.get("eos_token_id")
    return frozenset(token for token in (found if isinstance(found, list) else [found]) if type(token) is int)
