"""An exported .glb in a browser: three.js loads it, upright and in metres."""

from __future__ import annotations

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import tarfile
import threading

import numpy as np
import pytest

from bolid.body.export import export_mesh
from bolid.body.mesh import body_model
from bolid.body.shape import of_sex, population

CHROMIUM, NPM = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("npm")
PAGE = """<!doctype html><meta charset="utf-8">
<script type="importmap">{"imports": {"three": "./package/build/three.module.js"}}</script>
<pre id="out">nothing</pre>
<script type="module">
import * as THREE from "three";
import { GLTFLoader } from "./package/examples/jsm/loaders/GLTFLoader.js";
const out = document.getElementById("out");
new GLTFLoader().load("me.glb", ({ scene }) => {
    scene.updateMatrixWorld(true);
    const box = new THREE.Box3().setFromObject(scene);
    let triangles = 0, normals = true, materials = [];
    scene.traverse((part) => {
        if (!part.isMesh) return;
        triangles += part.geometry.index.count / 3;
        normals = normals && part.geometry.attributes.normal !== undefined;
        materials.push(part.material.name);
    });
    const low = box.min.toArray(), high = box.max.toArray();
    out.textContent = JSON.stringify({ low, high, triangles, normals, materials });
}, undefined, (error) => { out.textContent = JSON.stringify({ error: String(error) }); });
</script>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and NPM), reason="needs chromium and npm")
def test_three_js_loads_the_mesh(tmp_path):
    packed = subprocess.run(["npm", "pack", "three@0.170.0"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    if packed.returncode:
        pytest.skip("three.js cannot be fetched")
    with tarfile.open(tmp_path / packed.stdout.split()[-1]) as archive:
        archive.extractall(tmp_path, filter="data")
    model, woman = body_model(), of_sex(population().shape, "woman").mean
    vertices = model.posed(woman, "standing")
    export_mesh(tmp_path / "me.glb", vertices, model.faces)
    (tmp_path / "page.html").write_text(PAGE)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        shown = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
             "--virtual-time-budget=60000", "--dump-dom", f"http://127.0.0.1:{server.server_port}/page.html"],
            capture_output=True, text=True, timeout=180,
        )  # fmt: skip
    finally:
        server.shutdown()
    found = json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', shown.stdout, re.DOTALL)[1]))
    assert "error" not in found, found
    assert found["triangles"] == len(model.faces) and found["normals"] and found["materials"] == ["clay"]
    size = np.array(found["high"]) - found["low"]
    assert size == pytest.approx(np.ptp(vertices, axis=0)[[0, 2, 1]], abs=1e-4)  # y is up
    assert found["low"][1] == pytest.approx(0, abs=1e-4)
