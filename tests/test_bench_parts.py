"""What `attune bench` stands on: shapes against real models' calls, the timing harness, the inputs."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch
from test_models import flux as tiny_flux
from test_models import ltxv as tiny_ltxv

from comfyui_attune.attention.call import Layout
from comfyui_attune.measure import shapes
from comfyui_attune.measure.bench_inputs import Inputs, NoInputsError, input_bytes, read_captured
from comfyui_attune.measure.shapes import SETS, Shape, image_tokens, parse_shape, sdxl_levels, video_tokens
from comfyui_attune.measure.timing import Effort, Times, matmul_peak, measure

DEVICE = torch.device("cpu")
SMALL = Shape("small", 2, 3, 96, 40, 16)


# The shapes.


@pytest.mark.parametrize(
    ("video", "tokens"),
    [
        ((1280, 720, 81), 75_600),
        ((832, 480, 81), 32_760),
        ((832, 1216, 81), 21 * 76 * 52),
        ((832, 480, 1), 1560),
        ((832, 480, 4), 1560),
    ],
)
def test_wan_14b_has_the_token_counts_that_are_known_of_it(video, tokens):
    assert video_tokens(*video, shapes.WAN_14B) == tokens


def test_every_set_has_the_shapes_that_its_name_promises():
    by_name = {name: {shape.name: shape for shape in make()} for name, make in SETS.items()}
    wan = by_name["wan2.2-14b"]
    assert {(s.heads, s.head_dim, s.batch) for s in wan.values()} == {(40, 128, 1)}
    assert len(wan) == 14 and wan["1280x720 81f cross"].numbers == (1, 40, 75_600, 512, 128)
    assert by_name["wan2.2-5b"]["1280x704 121f self"].numbers == (1, 24, 31 * 22 * 40, 31 * 22 * 40, 128)
    assert by_name["flux-1024"]["flux 1024x1024 joint"].numbers == (1, 24, 4608, 4608, 128)
    assert by_name["qwen-image-1328"]["qwen 1328x1328 joint"].q_len == 83 * 83 + shapes.QWEN_TEXT
    assert {(s.heads, s.q_len, s.kv_len) for s in by_name["sdxl-1024"].values()} == {
        (10, 4096, 4096), (10, 4096, 77), (20, 1024, 1024), (20, 1024, 77),
    }  # fmt: skip
    assert by_name["hunyuanvideo"]["1280x720 129f joint"].numbers == (1, 24, 118_800 + 256, 118_800 + 256, 128)
    assert by_name["ltxv"]["768x512 97f self"].numbers == (1, 32, 13 * 16 * 24, 13 * 16 * 24, 64)
    assert sum(shape.flops for shape in by_name["smoke"].values()) < 2e10
    for name, found in by_name.items():
        assert len(found) == len(SETS[name]()), f"a name is there twice in {name}"


def test_the_memory_case_is_the_one_of_112_5_gib():
    batch, heads, q_len, kv_len, _ = shapes.MEMORY.numbers
    assert batch * heads * q_len * kv_len * 2 == 112.5 * 2**30


def test_the_work_of_a_shape_counts_two_products_of_two_operations():
    assert parse_shape("2,3,5,7,11").flops == 4 * 2 * 3 * 5 * 7 * 11


@pytest.mark.parametrize("text", ["", "1,2,3,4", "1,2,3,4,5,6", "1,2,3,4,0", "1,2,3,4,-5", "a,b,c,d,e", "1,2,3,4,1.5"])
def test_a_shape_that_is_none_is_refused_with_what_was_wanted(text):
    with pytest.raises(ValueError, match="wanted B,H,N,M,D"):
        parse_shape(text)


def test_a_video_smaller_than_a_cell_is_refused():
    with pytest.raises(ValueError, match="smaller than one cell"):
        video_tokens(16, 512, 9, shapes.LTXV)
    with pytest.raises(ValueError, match="no video"):
        video_tokens(512, 512, 0, shapes.LTXV)


def lengths(net, args, inputs) -> set[tuple[int, int]]:
    """(N, M) of every attention call that a model really makes."""
    seen = set()

    def note(function, q, k, v, heads, *others, **named):
        seen.add((q.shape[-2], k.shape[-2]))
        return function(q, k, v, heads, *others, **named)

    with torch.no_grad():
        net(*args, **inputs, transformer_options={"optimized_attention_override": note})
    return seen


def wan_net(channels: int):
    from comfy.ldm.wan.model import WanModel
    from comfy.ops import manual_cast

    net = WanModel(
        model_type="t2v", in_dim=channels, out_dim=channels, dim=256, ffn_dim=256, num_heads=2, num_layers=1,
        text_dim=16, device="cpu", dtype=torch.float32, operations=manual_cast,
    )  # fmt: skip
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return net.eval()


VIDEOS = {"wan_14b": (72, 96, 9), "wan_5b": (128, 96, 9), "ltxv": (128, 96, 16), "hunyuan": (64, 96, 12)}
LATENTS = """
import json, sys
path, videos = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, path)
import comfy.options
from comfy.cli_args import args
args.cpu = True
from comfy_extras.nodes_hunyuan import EmptyHunyuanLatentVideo
from comfy_extras.nodes_lt import EmptyLTXVLatentVideo
from comfy_extras.nodes_wan import Wan22ImageToVideoLatent
made = {
    "wan_14b": EmptyHunyuanLatentVideo.execute(*videos["wan_14b"]),
    "hunyuan": EmptyHunyuanLatentVideo.execute(*videos["hunyuan"]),
    "ltxv": EmptyLTXVLatentVideo.execute(*videos["ltxv"]),
    "wan_5b": Wan22ImageToVideoLatent.execute(None, *videos["wan_5b"], 1),
}
print(json.dumps({name: list(node.args[0]["samples"].shape) for name, node in made.items()}))
"""


@pytest.fixture(scope="module")
def latents(comfyui_folder, tmp_path_factory) -> dict[str, torch.Tensor]:
    """Latents of VIDEOS as ComfyUI's own nodes size them, in a process of its own: its `nodes` is not our folder."""
    command = [sys.executable, "-c", LATENTS, str(comfyui_folder), json.dumps(VIDEOS)]
    folder = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout.splitlines()[-1])
    return {name: torch.randn(size, generator=torch.Generator().manual_seed(0)) for name, size in sizes.items()}


@pytest.mark.parametrize(("name", "strides"), [("wan_14b", shapes.WAN_14B), ("wan_5b", shapes.WAN_5B)])
def test_wan_tokens_are_those_of_a_real_call(comfy, latents, name, strides):
    latent = latents[name]
    seen = lengths(wan_net(latent.shape[1]), (latent, torch.ones(1)), {"context": torch.randn(1, 512, 16)})
    tokens = video_tokens(*VIDEOS[name], strides)
    assert seen == {(tokens, tokens), (tokens, shapes.WAN_TEXT)}


def test_hunyuanvideo_tokens_are_those_of_a_real_call(comfy, latents):
    from comfy.ldm.hunyuan_video.model import HunyuanVideo
    from comfy.ops import manual_cast

    latent = latents["hunyuan"]
    net = HunyuanVideo(
        in_channels=16, out_channels=16, patch_size=[1, 2, 2], hidden_size=256, num_heads=2, mlp_ratio=1.0,
        depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56], theta=256, qkv_bias=True, guidance_embed=False,
        context_in_dim=32, vec_in_dim=8, byt5=False, meanflow=False, use_cond_type_embedding=False,
        vision_in_dim=None, meanflow_sum=False, dtype=torch.float32, device="cpu", operations=manual_cast,
    )  # fmt: skip
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    inputs = {"context": torch.randn(1, 5, 32), "y": torch.randn(1, 8), "guidance": None}
    seen = lengths(net.eval(), (latent, torch.ones(1)), inputs)
    tokens = video_tokens(*VIDEOS["hunyuan"], shapes.HUNYUAN) + 5
    assert seen == {(tokens, tokens), (5, 5)}, "the text is refined on its own first"


def test_qwen_image_tokens_are_those_of_a_real_call(comfy):
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
    from comfy.ops import manual_cast

    net = QwenImageTransformer2DModel(
        patch_size=2, in_channels=64, out_channels=16, num_layers=1, attention_head_dim=128, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(16, 56, 56), dtype=torch.float32, device="cpu", operations=manual_cast,
    )  # fmt: skip
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    latent = torch.randn(1, 16, 1, 96 // 8, 72 // 8)
    seen = lengths(net.eval(), (latent, torch.ones(1)), {"context": torch.randn(1, 7, 32)})
    tokens = image_tokens(72, 96) + 7
    assert seen == {(tokens, tokens)}


def test_flux_tokens_are_those_of_a_real_call(comfy):
    net, _, inputs, _ = tiny_flux()
    latent = torch.randn(2, 4, 96 // 8, 64 // 8)
    seen = lengths(net, (latent, torch.ones(2)), inputs)
    tokens = image_tokens(64, 96) + inputs["context"].shape[1]
    assert seen == {(tokens, tokens)}


def test_ltxv_tokens_are_those_of_a_real_call(comfy, latents):
    net, args, _, _ = tiny_ltxv()
    latent = latents["ltxv"]
    assert latent.shape[1] == 128  # the tiny model takes the first 8
    seen = lengths(net, (latent[:, :8].repeat(2, 1, 1, 1, 1), *args[1:]), {})
    tokens = video_tokens(*VIDEOS["ltxv"], shapes.LTXV, (1, 1, 1))
    assert seen == {(tokens, tokens), (tokens, 5)}


def test_sdxl_tokens_are_those_of_a_real_call(comfy):
    """A UNet with SDXL's levels (none, then twice halved) and heads of 64; its widths are smaller."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.ops import manual_cast

    net = UNetModel(
        image_size=8, in_channels=4, out_channels=4, model_channels=64, num_res_blocks=1, channel_mult=(1, 2, 4),
        num_head_channels=64, num_heads=-1, use_spatial_transformer=True, transformer_depth=[0, 1, 1],
        transformer_depth_output=[0, 0, 1, 1, 1, 1], transformer_depth_middle=1, context_dim=16,
        dtype=torch.float32, device="cpu", operations=manual_cast,
    )  # fmt: skip
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    seen = lengths(
        net.eval(), (torch.randn(2, 4, 128 // 8, 192 // 8), torch.ones(2)), {"context": torch.randn(2, 77, 16)}
    )
    assert seen == {(shape.q_len, shape.kv_len) for shape in sdxl_levels(192, 128)}


# The timing harness.


def test_times_are_those_of_a_function_of_known_cost():
    times = measure(lambda: time.sleep(0.02), DEVICE, Effort(warm=1, least=5, most=5))
    assert len(times.seconds) == 5
    assert min(times.seconds) >= 0.02 and times.low <= times.median <= times.high
    assert times.median < 0.06, "sleeping for 20 ms was measured as far more"


def test_what_makes_inputs_fresh_is_done_each_time_and_not_timed():
    done = []

    def fresh():
        done.append(1)
        time.sleep(0.03)

    times = measure(lambda: None, DEVICE, Effort(warm=2, least=4, most=4), fresh)
    assert len(done) == 6
    assert times.median < 0.01


def test_a_costlier_function_is_measured_as_costlier():
    a = torch.randn(256, 256)
    one = measure(lambda: a @ a, DEVICE, Effort(least=9, most=9))
    many = measure(lambda: [a @ a for _ in range(20)], DEVICE, Effort(least=9, most=9))
    assert many.median > 5 * one.median


def test_the_budget_ends_repeats_and_one_call_is_enough_where_it_is_slow():
    calls = []
    measure(lambda: calls.append(time.sleep(0.05)), DEVICE, Effort(warm=3, least=5, most=50, budget=0.01))
    assert len(calls) == 2, "one to warm up, one that is timed"
    assert len(measure(lambda: None, DEVICE, Effort(warm=0, least=3, most=7, budget=60)).seconds) == 7


def test_the_device_is_read_while_it_still_works():
    order = []
    measure(lambda: order.append("call"), DEVICE, Effort(0, 1, 1), busy=lambda: order.append("read"))
    assert order == ["call", "call", "read"]


def test_quartiles_leave_a_stray_call_out_of_the_spread():
    times = Times((1.0, 1.0, 1.1, 1.2, 9.0))
    assert (times.low, times.median, times.high) == (1.0, 1.1, 1.2)
    assert times.spread == pytest.approx(0.2 / 1.1)
    assert Times((2.0,)).spread == 0


def test_the_matmul_peak_is_that_of_a_matrix_product():
    a = torch.randn(1024, 1024)
    once = min(measure(lambda: a @ a, DEVICE, Effort(3, 9, 9)).seconds)
    peak = matmul_peak(DEVICE, torch.float32)
    assert 0.2 < peak / (2 * 1024**3 / once / 1e12) < 5, "other processes may disturb one of the two, not by so much"


# Inputs.


def test_inputs_are_new_at_each_repeat_the_same_for_each_kernel_and_in_models_memory_order():
    inputs = Inputs(SMALL, torch.float32, DEVICE)
    first = [[t.clone() for t in inputs.bhnd()]]
    for _ in range(3):
        inputs.fresh()
        first.append([t.clone() for t in inputs.bhnd()])
    assert not any(torch.equal(first[a][1], first[b][1]) for a in range(4) for b in range(a))
    inputs.begin()
    assert all(torch.equal(a, b) for a, b in zip(first[0], inputs.bhnd(), strict=True))
    q, k, _ = inputs.for_kernel(Layout.BNHD)
    assert q.shape == (2, 96, 3, 16) and k.shape == (2, 40, 3, 16) and q.is_contiguous()
    assert torch.equal(inputs.bhnd()[0], q.transpose(1, 2))


def test_two_sets_of_tensors_take_turns():
    inputs = Inputs(SMALL, torch.float32, DEVICE)
    places = []
    for _ in range(4):
        places.append(inputs.bhnd()[0].data_ptr())
        inputs.fresh()
    assert places[0] != places[1] and places[:2] == places[2:]


def test_inputs_have_the_structure_that_quantising_kernels_fail_on():
    inputs = Inputs(Shape("one", 1, 2, 512, 512, 64), torch.float32, DEVICE)
    inputs.fill("bias_k")
    assert float(inputs.bhnd()[1].mean(2).abs().mean()) > 2
    inputs.fill("bias_v")
    assert float(inputs.bhnd()[2].mean(2).abs().mean()) > 2
    inputs.fill("spike_k")
    channels = inputs.bhnd()[1].square().mean((0, 1, 2)).sqrt().sort().values
    assert float(channels[-2] / channels[-3]) > 3


def test_many_heads_are_made_of_few_without_two_of_them_being_alike(monkeypatch):
    from comfyui_attune.measure import bench_inputs

    monkeypatch.setattr(bench_inputs, "_BASE", 2 * 64 * 8)
    q, k, v = Inputs(Shape("heads", 2, 5, 64, 64, 8), torch.float32, DEVICE).bhnd()
    for tensor in (q, k, v):
        heads = tensor.flatten(0, 1)
        assert not any(torch.equal(heads[a], heads[b]) for a in range(10) for b in range(a))


def test_the_seed_decides_the_numbers():
    one, same, other = (Inputs(SMALL, torch.float32, DEVICE, seed).bhnd()[0] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_what_inputs_hold_is_what_was_said_beforehand():
    inputs = Inputs(SMALL, torch.float32, DEVICE)
    held = [t for one in (*inputs._sets, *inputs._base.values()) for t in one]
    out = 2 * 3 * 96 * 16 * 4
    assert sum(t.numel() * t.element_size() for t in held) + out <= input_bytes(SMALL, torch.float32)


def save_captured(path, **tensors):
    from safetensors.torch import save_file

    save_file(tensors, str(path))
    return path


def test_captured_tensors_are_used_as_they_are(tmp_path):
    q, k, v = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    path = save_captured(tmp_path / "ein Aufruf é.safetensors", **{"block 3.q": q, "block 3.k": k, "block 3.v": v})
    (captured,) = read_captured(path)
    assert captured.shape == Shape("captured block 3", 1, 2, 6, 5, 8)
    inputs = Inputs(captured.shape, torch.float32, DEVICE, captured=captured.tensors)
    assert all(torch.equal(a, b) for a, b in zip(inputs.bhnd(), (q, k, v), strict=True))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a": (1, 2, 3, 4)}, "no tensors called q, k and v"),
        ({"q": (1, 2, 3, 4)}, "wanted q"),
        ({"q": (1, 2, 3, 4), "k": (1, 2, 3, 5), "v": (1, 2, 3, 5)}, "wanted q"),
        ({"q": (2, 3, 4), "k": (2, 3, 4), "v": (2, 3, 4)}, "wanted q"),
    ],
)
def test_a_file_without_usable_tensors_is_refused(tmp_path, tensors, said):
    path = save_captured(tmp_path / "x.safetensors", **{name: torch.zeros(size) for name, size in tensors.items()})
    with pytest.raises(NoInputsError, match=said):
        read_captured(path)


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(NoInputsError, match="no safetensors file"):
        read_captured(path)
