"""The base of a request with its LoRAs and adapters, and its ControlNet."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from bolid.errors import BolidError
from bolid.generate.adapters import LoadedAdapter, load_adapters
from bolid.generate.models import Models
from bolid.generate.request import Request
from bolid.run import canonical_json, sha256_file


class Networks:
    """`pipe`, the base ready to sample; the `adapters` in it; `controlnet`, or None; `inputs`, the hashes of their
    files.

    What `models` holds is not loaded again. Raises BolidError for files that do not belong together, and for steps
    that do not suit the sampler.
    """

    def __init__(self, request: Request, branches: Sequence[str], models: Models) -> None:
        self.request, self.family, self.branches = request, request.family, branches
        self.pipe, self.adapters = models.pipe(self._key(), self._load)
        self._check_steps()
        self.controlnet = None
        if part := request.control_part:
            self.controlnet = models.controlnet(self._key(), part, lambda: self._load_controlnet(part))
        self.inputs = self._hashes()

    def _key(self) -> Hashable:
        """What a pipeline is known by: the files in it, as they are now, and how they are loaded."""
        request, family = self.request, self.family
        files = [family.base, family.unet, *(path for path, _ in request.loras)]
        files += [request.adapter_files[branch] for branch in self.branches]
        states = tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files if path.exists())
        weights = tuple(weight for _, weight in request.loras)
        how = (request.device, request.dtype, request.offload, request.few_steps, canonical_json(request.sampler))
        return (family.name, str(family.root), states, weights, tuple(self.branches), *how)

    def _load(self) -> tuple[Any, dict[str, LoadedAdapter]]:
        from bolid.backends.attention import cache_conditions
        from bolid.backends.diffusion import choose_dtype, load_base, load_loras
        from bolid.backends.diffusion import offload as offload_networks

        request, loras = self.request, list(self.request.loras)
        if request.few_steps:
            loras.insert(0, (self.family.require("few_steps_lora"), 1.0))
        dtype = choose_dtype(request.dtype, request.device)
        pipe = load_base(self.family, "cpu" if request.offload else request.device, dtype, request.sampler)
        load_loras(pipe, loras, self.family)
        adapters = load_adapters(pipe, request, self.branches) if self.branches else {}
        cache_conditions(pipe.unet)
        if request.offload:
            offload_networks(pipe, request.device)
        return pipe, adapters

    def _load_controlnet(self, part: str) -> Any:
        from bolid.backends.attention import cache_conditions
        from bolid.backends.diffusion import load_controlnet

        network = load_controlnet(self.pipe, self.family, part)
        cache_conditions(network)
        return network

    def _check_steps(self) -> None:
        for steps in {cell.steps for cell in self.request.cells}:
            try:
                self.pipe.scheduler.set_timesteps(steps)
            except ValueError as error:
                raise BolidError(f"--steps {steps} does not suit the sampler: {error}", "give fewer") from error

    def _hashes(self) -> dict[str, str]:
        request = self.request
        hashes = {f"lora_{i}": sha256_file(path) for i, (path, _) in enumerate(request.loras)}
        if request.base is not None and Path(request.base).is_file():
            hashes["base"] = sha256_file(request.base)
        if request.few_steps:
            hashes["few_steps_lora"] = sha256_file(self.family.require("few_steps_lora"))
        return hashes | {f"{branch}_adapter": adapter.sha256 for branch, adapter in self.adapters.items()}
