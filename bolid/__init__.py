"""BoLID: personalised pictures of people that keep the body as well as the face.

Every command of the ``bolid`` program has a twin here: ``bolid.extract.extract``, ``bolid.shard.shard``,
``bolid.train_vae.train_vae``, ``bolid.profile.make_profile``, ``bolid.generate.generate`` and so on.
"""

from __future__ import annotations

from bolid.errors import BolidError

__version__ = "0.1.0"
__all__ = ["BolidError", "__version__"]
