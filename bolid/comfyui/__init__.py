"""BoLID's nodes for ComfyUI: link this folder into `ComfyUI/custom_nodes`, and install bolid into ComfyUI's Python.

pip install -e PATH/TO/BOLID
ln -s PATH/TO/BOLID/bolid/comfyui ComfyUI/custom_nodes/bolid
"""

from __future__ import annotations

from bolid.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
