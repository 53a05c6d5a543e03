"""The branches spread over the processes of a training: FSDP (Zhao et al. 2023, arXiv:2304.11277) as torch has it.

The frozen base lies whole in every process. What is spread are the branches' weights, gradients, moments and moving
average: SDXL's full branches need 11 GB of those. A layer's weights are put together for its own pass and let go again.
"""

from __future__ import annotations

from typing import Any

import torch


def shard_branches(unet: torch.nn.Module, device: str) -> None:
    """Spread the branches that `install` has put into `unet` over all processes; their parameters are new ones then."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    network: Any = unet
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    frozen = {parameter for parameter in unet.parameters() if not parameter.requires_grad}
    for name, processor in network.attn_processors.items():
        if not name.endswith("attn1.processor"):
            # Not the processor itself: diffusers calls it past the hooks that a module's own call would run.
            fully_shard([*processor.to_k_ip, *processor.to_v_ip], mesh=mesh)
    for layer in network.encoder_hid_proj.image_projection_layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh, ignored_params=frozen)  # the root, which fetches the next layer's weights early
