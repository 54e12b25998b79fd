"""models.AST against the original's numbers, plain attention and plain loops; its masks."""

import re

import numpy as np
import pytest
import torch
from conftest import oracle_tensors
from torch import Tensor, nn

from data import DataError
from models import AST, adapt_ast, ast_from_ssast, cluster_mask, patches

SMALL = {"frames": 96, "mel": 48, "width": 16, "depth": 2, "heads": 2}
ROWS, COLUMNS = 3, 6
GROUPS = [[4, 0], [2], [1, 3]]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small_ast(**args) -> AST:
    """Weights larger than at the start, so that everything has an influence that shows."""
    model = AST(**(SMALL | args)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def make_fbank(frames: int = 96, clips: int = 2) -> Tensor:
    return torch.randn(clips, frames, 48, generator=torch.Generator().manual_seed(frames))


def largest(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a.detach().double() - b.detach().double()).abs().max())


@pytest.fixture(scope="module")
def oracle() -> dict[str, Tensor]:
    return oracle_tensors("ssast.npz")


def original_weights(oracle: dict, *prefixes: str) -> dict[str, Tensor]:
    return {k.removeprefix(p): value for p in prefixes for k, value in oracle.items() if k.startswith(p)}


def test_tokens_and_losses_equal_the_originals(oracle):
    model = ast_from_ssast(original_weights(oracle, "w/"), frames=256)
    x, mask, seen = oracle["x"][:, :256].float(), oracle["mask_ids"], []
    model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    hidden, target, there = model.masked(x, mask, None)
    assert there.all()
    assert torch.equal(target, oracle["pretrain/target_patches"])
    assert largest(model.tokens(x, None)[0], oracle["pretrain/patch_embed"]) < 1e-5
    assert largest(seen[0], oracle["pretrain/tokens"]) < 2e-5
    assert largest(model.discriminate(hidden), oracle["pretrain/cpred"]) < 1e-5
    assert largest(model.generate(hidden), oracle["pretrain/gpred"]) < 1e-5
    for compat, nce, accuracy in ((True, "nce", "acc"), (False, "nce_other_axis", "acc_raw_over_targets")):
        losses = {name: value.item() for name, value in model.pretrain_losses(x, mask, compat=compat).items()}
        expected = [float(oracle[f"pretrain/{name}"]) for name in (nce, accuracy, "mse")]
        assert [losses[name] for name in ("nce", "accuracy", "mse")] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", ["same", "short", "long", "overlap"])
@pytest.mark.parametrize(("pooling", "key"), [("mean", "logits"), ("cls", "logits_cls")])
def test_ratings_equal_the_originals(oracle, case, pooling, key):
    frames, stride = (int(oracle[f"ft/{case}/{name}"]) for name in ("tdim", "stride"))
    weights = original_weights(oracle, "w/", "ft/w/")
    model = ast_from_ssast(weights, frames=frames, num_outputs=19, stride=stride, pooling=pooling)
    assert largest(model.position(model.columns), oracle[f"ft/{case}/pos_embed"][0, 2:]) < 1e-6
    assert largest(model.extra[1], oracle[f"ft/{case}/pos_embed"][0, :2]) == 0
    x = oracle["x"][:, :frames].float()
    assert largest(model(x), oracle[f"ft/{case}/{key}"]) < 2e-5


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"v.pos_embed": None}, "pos_embed"),
        ({"v.patch_embed.proj.weight": torch.zeros(192, 1, 128, 2)}, "embed.weight"),
        ({"v.blocks.1.mlp.fc1.bias": None}, "blocks.1.fc1.bias"),
        ({"v.blocks.0.attn.qkv.gain": torch.ones(1)}, "blocks.0.qkv.gain"),
        ({f"cpredlayer.0.{kind}": None for kind in ("weight", "bias")}, "discriminate.0.weight"),
    ],
)
def test_foreign_ssast_weights_are_refused(oracle, change, found):
    weights = original_weights(oracle, "w/module.") | change
    with pytest.raises(DataError, match=rf"^SSAST weights: [^\n]*{re.escape(found)}[^\n]*$"):
        ast_from_ssast({k: v for k, v in weights.items() if v is not None}, frames=256)


HUGGING_FACE = {  # its names, in the order in which they apply, of AST's
    "v.pos_embed": "embeddings.position_embeddings",
    "v.cls_token": "embeddings.cls_token",
    "v.dist_token": "embeddings.distillation_token",
    "v.patch_embed.proj": "embeddings.patch_embeddings.projection",
    "v.blocks": "encoder.layer",
    "v.norm": "layernorm",
    "attn.proj": "attention.output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def as_hugging_face(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in weights.items():
        for original, own in HUGGING_FACE.items():
            name = name.replace(original, own)
        name = name if "classifier" in name else f"audio_spectrogram_transformer.{name}"
        if "attn.qkv" in name:
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                found[name.replace("attn.qkv", f"attention.attention.{part}")] = third
        else:
            found[name] = value
    return found


@pytest.mark.parametrize(("stride", "columns"), [(16, 4), (16, 6), (10, 4), (10, 3)])
def test_public_ast_and_its_hugging_face_form_are_read(stride, columns):
    """As published: no mask, a head of other outputs; positions of either stride."""
    frames = (columns - 1) * stride + 16
    known = {"frames": frames, "mel": 128, "width": 64, "depth": 2, "heads": 1, "stride": stride}
    model = small_ast(**known, ssast_compat=True, num_outputs=5, pooling="cls")
    state = model.state_dict()
    weights = {"v.cls_token": state["extra"][:1, :1], "v.dist_token": state["extra"][:1, 1:]}
    table = [state["extra"][1], state["position.freq"].flatten(0, 1)]
    weights["v.pos_embed"] = torch.cat(table).unsqueeze(0)
    for name, value in state.items():
        name = re.sub(r"(qkv|proj)", r"attn.\1", re.sub(r"(fc\d)", r"mlp.\1", name))
        if name.startswith(("blocks", "norm")):
            weights[f"v.{name}"] = value
        elif name.startswith("embed"):
            weights[name.replace("embed", "v.patch_embed.proj")] = value
    x = torch.randn(2, frames, 128)
    for public in (weights, as_hugging_face(weights)):
        head = {k.replace("head", "mlp_head"): v for k, v in state.items() if k.startswith("head.")}
        same = ast_from_ssast(public | head, frames=frames, num_outputs=5, pooling="cls", dropout=0.0)
        assert largest(same(x), model(x)) < 1e-6
    classes = {"classifier.layernorm.weight": torch.ones(64), "classifier.layernorm.bias": torch.ones(64)}
    classes |= {"classifier.dense.weight": torch.ones(7, 64), "classifier.dense.bias": torch.ones(7)}
    other = ast_from_ssast(public | classes, frames=frames, num_outputs=5, pooling="cls", dropout=0.0)
    assert largest(other.tokens(x, None)[0], model.tokens(x, None)[0]) < 1e-6
    assert len(other.head[1].bias) == 5
    if stride == 10:
        with pytest.raises(DataError, match="stride 16 in pre-training"):
            ast_from_ssast(public, frames=frames)


def test_patches_are_numbered_frequency_major():
    x = make_fbank()
    found = patches(x)
    assert found.shape == (2, ROWS * COLUMNS, 256)
    for row, column in ((0, 0), (1, 4), (2, 5)):
        square = x[1, 16 * column : 16 * column + 16, 16 * row : 16 * row + 16]
        assert torch.equal(found[1, row * COLUMNS + column], square.T.flatten())
    model = small_ast()
    projected = model.tokens(x, None)[0]
    assert largest(projected, found @ model.embed.weight.flatten(1).T + model.embed.bias) < 1e-5


@pytest.mark.parametrize(
    "args",
    [{}, {"ssast_compat": True}, {"pooling": "meanstd", "stride": 10}, {"groups": GROUPS}],
)
def test_ratings_do_not_see_padding_or_batch_mates(args):
    model = small_ast(num_outputs=5, **args)
    lengths = torch.tensor([96, 50, 17, 69])
    x = make_fbank(clips=4)
    logits = model(x, lengths)
    assert logits.std(0).min() > 1e-3
    for i, T in enumerate(lengths):
        assert largest(logits[i], model(x[i : i + 1, :T])[0]) < 1e-5
        other = x.clone()
        other[i, T:] = 20 * torch.randn(96 - T, 48)
        whole = (T - 16) // model.stride * model.stride + 16  # a patch needs all its frames
        other[i, whole:T] = 5.0
        assert largest(model(other, lengths), logits) < 1e-5


def test_pooling_by_hand():
    x, lengths = make_fbank(), torch.tensor([96, 40])
    for pooling in ("mean", "meanstd", "cls"):
        model = small_ast(num_outputs=5, pooling=pooling, ssast_compat=True)
        tokens = small_ast(ssast_compat=True)  # without ratings: the tokens themselves
        tokens.load_state_dict(model.state_dict(), strict=False)
        tokens = tokens(x, lengths)[1]
        own = tokens[2:].view(ROWS, COLUMNS, -1)[:, :2].flatten(0, 1)
        by_hand = {"mean": own.mean(0), "cls": tokens[:2].mean(0)}
        by_hand["meanstd"] = torch.cat([own.mean(0), (own.var(0, correction=0) + 1e-6).sqrt()])
        assert largest(model(x, lengths)[1], model.head(by_hand[pooling])) < 1e-5


@torch.no_grad()
def test_groups_rate_their_own_outputs():
    x = make_fbank()
    model = small_ast(num_outputs=5, groups=GROUPS, balance="uncertainty")
    assert model.log_variance.shape == (3,)
    before = model(x)
    model.head.read[0].bias += torch.tensor([1.0, 2.0])
    assert (model(x) - before)[0].tolist() == pytest.approx([2, 0, 0, 0, 1], abs=1e-5)
    before = model(x)
    model.head.query[1][1].weight *= -1
    moved = (model(x) - before).abs().amax(0)
    assert [d for d in range(5) if moved[d] < 1e-6] == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("args", "found"),
    [
        ({"heads": 3}, "width"),
        ({"num_outputs": 3, "groups": [[0, 1], [1, 2]]}, "output"),
        ({"num_outputs": 5, "pooling": "cls"}, "ssast_compat"),
        ({"stride": 10}, "stride"),
    ],
)
def test_impossible_arguments_are_refused(args, found):
    with pytest.raises(DataError, match=found):
        AST(**(SMALL | args))


VARIANTS = [
    {},
    {"ssast_compat": True},
    {"visible_only": True, "ssast_compat": True},
    {"num_outputs": 5},
    {"num_outputs": 5, "groups": GROUPS, "pooling": "meanstd"},
    {"num_outputs": 5, "stride": 10, "ssast_compat": True},
]


@pytest.mark.parametrize("args", VARIANTS)
def test_every_parameter_receives_a_gradient_with_or_without_checkpointing(args):
    found, x, mask = [], make_fbank(), cluster_mask(2, ROWS, COLUMNS, 11)
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = small_ast(checkpointing=checkpointing, dropout=0.3, **args).train()
        torch.manual_seed(2)
        out = model(x) if "num_outputs" in args else model(x, mask=mask)
        loss = out.square().sum() if "num_outputs" in args else out["nce"] + 10 * out["mse"]
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
        found.append([loss] + [p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("visible_only", [False, True])
@pytest.mark.parametrize("ssast_compat", [False, True])
def test_losses_of_a_padded_batch_are_the_mean_over_its_clips(visible_only, ssast_compat):
    model = small_ast(visible_only=visible_only, ssast_compat=ssast_compat)
    lengths = torch.tensor([96, 50, 69])
    x, columns = make_fbank(clips=3), model.count(lengths)
    mask = cluster_mask(3, ROWS, COLUMNS, 12, columns=columns)
    assert (mask >= 0).sum(1).tolist() == [12, 6, 8]
    together = model.pretrain_losses(x, mask, lengths=lengths)
    alone = []
    for i, T in enumerate(lengths):
        ids = mask[i : i + 1][mask[i : i + 1] >= 0]
        ids = ids // COLUMNS * columns[i] + ids % COLUMNS  # numbers in the clip's own grid
        alone.append(model.pretrain_losses(x[i : i + 1, :T], ids[None]))
    for name in ("nce", "mse", "accuracy", "chance"):
        expected = np.mean([out[name].item() for out in alone])
        assert together[name].item() == pytest.approx(expected, rel=1e-5)
    garbage = torch.where(torch.arange(96)[:, None] < (columns * 16)[:, None, None], x, 30.0)
    assert model(garbage, lengths, mask)["mse"].item() == pytest.approx(together["mse"].item(), rel=1e-5)


@pytest.mark.parametrize("visible_only", [False, True])
def test_masked_patches_are_hidden(visible_only):
    model, x, sizes = small_ast(visible_only=visible_only), make_fbank(), []
    mask = cluster_mask(2, ROWS, COLUMNS, 12)

    def picture(patches):
        return patches.view(2, ROWS, COLUMNS, 16, 16).permute(0, 2, 4, 1, 3).reshape(x.shape)

    other = picture(patches(x).scatter(1, mask.unsqueeze(2).expand(-1, -1, 256), 50.0))
    model.blocks[0].register_forward_hook(lambda module, args, output: sizes.append(output.shape[1]))
    (hidden, target, _), (again, changed, _) = model.masked(x, mask, None), model.masked(other, mask, None)
    assert torch.equal(hidden, again)
    assert (changed == 50.0).all()
    assert torch.equal(target, torch.stack([patches(x)[b, ids] for b, ids in enumerate(mask)]))
    assert sizes == [6 if visible_only else 18] * 2


def test_a_patch_must_be_left_to_see():
    everything = torch.arange(ROWS * COLUMNS).expand(2, -1)
    with pytest.raises(DataError, match="--mask"):
        small_ast(visible_only=True).pretrain_losses(make_fbank(), everything)
    assert small_ast().pretrain_losses(make_fbank(), everything)["nce"].isfinite()


def test_mean_patch_by_hand():
    model, x, mask = small_ast(), make_fbank(), cluster_mask(2, ROWS, COLUMNS, 9)
    target = model.masked(x, mask, None)[1].flatten(0, 1)
    expected = (target - target.mean(0)).square().mean()
    assert float(model.pretrain_losses(x, mask)["mse_mean"]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("args", [{}, {"ssast_compat": True}, {"visible_only": True}])
def test_encoder_is_kept_and_positions_fitted(args):
    old, x = small_ast(**args), make_fbank()
    same = adapt_ast(old, num_outputs=5, groups=GROUPS)
    tokens = same.tokens(x, None)[0] + same.position(COLUMNS)
    assert torch.equal(same.encode(tokens, None)[-1], old(x))
    short = adapt_ast(old, frames=64, num_outputs=5).position(4).view(ROWS, 4, -1)
    first = 1 if args.get("ssast_compat") else 0  # the original takes the table's centre
    assert torch.equal(short, old.position(6).view(ROWS, 6, -1)[:, first : first + 4])
    grid = old.position(COLUMNS).view(ROWS, COLUMNS, -1).permute(2, 0, 1)[None]
    resized = nn.functional.interpolate(grid, (4, 9), mode="bilinear")[0].permute(1, 2, 0).flatten(0, 1)
    assert largest(adapt_ast(old, stride=10, num_outputs=5).position(9), resized) < 1e-5
    for changes in ({"width": 32}, {"ssast_compat": old.extra is None}):
        with pytest.raises(DataError, match="cannot become"):
            adapt_ast(old, num_outputs=5, **changes)


@pytest.mark.parametrize(
    ("freq", "time", "count"), [(8, 64, 400), (8, 62, 387), (1, 1, 1), (8, 64, 512), (8, 6, 1)]
)
def test_masks_hold_exactly_as_many_patches_as_asked(freq, time, count):
    masks = [cluster_mask(50, freq, time, count, generator=torch.manual_seed(3)) for _ in "12"]
    assert (masks[0].shape, masks[0].dtype) == ((50, count), torch.int64)
    assert all(len({*row} & {*range(freq * time)}) == count for row in masks[0].tolist())
    assert torch.equal(*masks)


@pytest.mark.slow
def test_every_patch_of_the_grid_is_equally_likely():
    n, draws = 10000, torch.manual_seed(5)
    masks = torch.cat([cluster_mask(2000, 8, 64, 400, generator=draws) for _ in range(n // 2000)])
    rate = torch.bincount(masks.flatten(), minlength=512) / n
    sampling = (400 / 512 * (1 - 400 / 512) / n) ** 0.5
    assert (rate - 400 / 512).abs().max() < 0.008 + 4 * sampling  # the exact count leaves corners .006 short


def test_masks_are_square_clusters_cut_at_the_edge():
    for side in (3, 4, 5):
        mask = cluster_mask(4000, 8, 64, side**2, side=(side, side), generator=torch.manual_seed(side))
        height, width = (axis.amax(1) - axis.amin(1) + 1 for axis in (mask // 64, mask % 64))
        whole = ((height == side) & (width == side)).float().mean()
        uncut = (8 - side + 1) * (64 - side + 1) / ((8 + side - 1) * (64 + side - 1))  # places
        assert float(whole) == pytest.approx(uncut, abs=0.04)


def test_masks_of_shorter_clips_stay_inside():
    columns = torch.tensor([64, 63, 32, 10, 1])
    mask = cluster_mask(5, 8, 64, 400, columns=columns)
    assert (mask >= 0).sum(1).tolist() == [400, 394, 200, 62, 6]
    for ids, limit in zip(mask, columns, strict=True):
        ids = ids[ids >= 0]
        assert len(ids.unique()) == len(ids)
        assert (ids % 64).max() < limit
    for count in (0, 513):
        with pytest.raises(DataError, match="1 to 512"):
            cluster_mask(2, 8, 64, count)
