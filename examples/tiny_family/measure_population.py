"""Write into a body encoder how the bodies of people are spread, as it sees them.

    python examples/tiny_family/measure_population.py photos/people --out bolid/tiny/body-encoder.safetensors

`bolid train-vae` does that at its end, with the people it has trained on. This is for an encoder from before it did, or
to take people that it has not trained on. Photos go the way of `bolid profile`; the network and the space of its
vectors stay as they are, to the bit. 800 people with 8 photos: 8 minutes on one core.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from measure_body_encoder import encode_people

from bolid.backends.body import BodyEncoder, fit_body_prior, save_body_encoder
from bolid.models.families import get_family


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="photos/<person>/*.jpg with their truth beside them")
    parser.add_argument("--people", type=int, help="only the first so many")
    parser.add_argument("--body-encoder", type=Path, help="by default the tiny family's")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    encoder = BodyEncoder(args.body_encoder or get_family("tiny").require("body_encoder"))
    people, _, _ = encode_people(args.photos, encoder, args.people)
    record = {**encoder.record, "space": encoder.space, "population": len(people)}
    save_body_encoder(args.out, encoder.model, record, fit_body_prior(people))
    print(args.out)


if __name__ == "__main__":
    main()
