import hashlib
import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatllama import cli
from chatllama.importing import hugging_face
from chatllama.importing.meta_checkpoint import import_meta
from chatllama.importing.meta_shards import shard_files
from chatllama.model.weight_files import write_model

STORIES = "stories260k"
PARAMS = {"dim": 32, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5, "multiple_of": 8}
GROUPED = {**PARAMS, "n_heads": 8, "n_kv_heads": 4, "ffn_dim_multiplier": 1.3}
ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
COLUMNS = ("wo", "w2")


def meta_weights(
    params: dict[str, Any], vocab_size: int = 300, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Random weights, large enough that every mistake shows in the logits."""
    generator = torch.Generator().manual_seed(5)
    dim, heads = params["dim"], params["n_heads"]
    kv_dim = dim // heads * params.get("n_kv_heads", heads)
    ffn = 8 * math.ceil(int(params.get("ffn_dim_multiplier", 1) * int(8 * dim / 3)) / 8)
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (vocab_size, dim)}
    for layer in range(params["n_layers"]):
        at, mlp = f"layers.{layer}.attention.", f"layers.{layer}.feed_forward."
        shapes |= {at + "wq": (dim, dim), at + "wk": (kv_dim, dim), at + "wv": (kv_dim, dim)}
        shapes |= {at + "wo": (dim, dim), mlp + "w1": (ffn, dim), mlp + "w2": (dim, ffn)}
        shapes |= {mlp + "w3": (ffn, dim), f"layers.{layer}.attention_norm": (dim,)}
        shapes |= {f"layers.{layer}.ffn_norm": (dim,)}
    shapes |= {"norm": (dim,), "output": (vocab_size, dim)}
    weights = {
        f"{name}.weight": (torch.randn(shape, generator=generator) * 0.3).to(dtype)
        for name, shape in shapes.items()
    }
    head_dim = dim // heads
    freqs = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    for layer in range(params["n_layers"]):
        weights[f"layers.{layer}.attention.inner_attention.rope.freqs"] = freqs.to(dtype)
    return weights


def write_meta(
    folder: Path,
    tokenizer: Path,
    params: dict[str, Any],
    weights: dict[str, torch.Tensor],
    num_shards: int = 1,
    embedding_axis: int = 1,
) -> Path:
    """Meta's layout, split as fairscale splits it."""
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps({"vocab_size": -1, **params}))
    shutil.copyfile(tokenizer / "tokenizer.model", folder / "tokenizer.model")
    for shard in range(num_shards):
        own = {}
        for name, tensor in weights.items():
            layer = name.split(".")[-2]
            axis = 0 if layer in ROWS else 1 if layer in COLUMNS else None
            axis = embedding_axis if layer == "tok_embeddings" else axis
            own[name] = tensor if axis is None else tensor.chunk(num_shards, axis)[shard].clone()
        torch.save(own, folder / f"consolidated.{shard:02d}.pth")
    return folder


@pytest.fixture
def grouped(tmp_path: Path, tiny_tokenizer_dir: Path) -> Path:
    """Four shards, grouped-query attention, half precision."""
    weights = meta_weights(GROUPED, dtype=torch.float16)
    return write_meta(tmp_path / "meta", tiny_tokenizer_dir, GROUPED, weights, 4)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def greedy(folder: Path) -> list[str]:
    """What plain transformers says, as a user would ask it."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = []
    for prompt in ("Once upon a time", "Lily and Tom went to the park", "The dog"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        new = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None)
        texts.append(tokenizer.decode(new[0], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("variant", ["meta", "meta_fp16", "meta_mp2"])
def test_stories_say_what_the_hugging_face_folder_says(
    variant: str, testdata: Path, tmp_path: Path
) -> None:
    source, out = testdata / STORIES / variant, tmp_path / "out"
    assert cli.main(["import", str(source), "--out", str(out)]) == 0
    assert greedy(out) == greedy(testdata / STORIES / "hf")
    info = json.loads((out / "chatllama.json").read_text())
    assert info["stage"] == "import" and 0 < info["logit_difference"] < 1e-5
    first = (source / "consolidated.00.pth").read_bytes()
    assert info["sha256"]["consolidated.00.pth"] == hashlib.sha256(first).hexdigest()
    assert info["dtype"] == ("float16" if variant == "meta_fp16" else "float32")
    assert str(testdata.resolve()) not in (out / "chatllama.json").read_text()


def test_stories_are_bit_equal_to_the_published_tensors_however_sharded(
    testdata: Path, tmp_path: Path
) -> None:
    published = load_file(testdata / STORIES / "hf" / "model.safetensors")
    published["lm_head.weight"] = published["model.embed_tokens.weight"]
    for variant in ("meta", "meta_mp2"):
        out = import_meta(testdata / STORIES / variant, tmp_path / variant)
        assert_equal(tensors_of(out), published)
    single, double = (tmp_path / v / "model.safetensors" for v in ("meta", "meta_mp2"))
    assert single.read_bytes() == double.read_bytes()


@pytest.mark.parametrize("embedding_axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("params", [PARAMS, GROUPED])
def test_any_sharding_gives_the_same_folder(
    params: dict[str, Any],
    dtype: torch.dtype,
    embedding_axis: int,
    tmp_path: Path,
    tiny_tokenizer_dir: Path,
) -> None:
    weights = meta_weights(params, dtype=dtype)
    found = []
    for count in (1, 4):
        name = f"meta{count}"
        folder = write_meta(
            tmp_path / name, tiny_tokenizer_dir, params, weights, count, embedding_axis
        )
        out = import_meta(folder)
        assert out == (tmp_path / f"{name}-hf").resolve()
        found.append(tensors_of(out))
    assert_equal(*found)
    assert found[0]["model.layers.1.mlp.down_proj.weight"].dtype == dtype
    expected = weights["layers.1.feed_forward.w2.weight"]
    assert torch.equal(found[0]["model.layers.1.mlp.down_proj.weight"], expected)


@pytest.mark.parametrize(
    ("params", "count", "embedding_axis"), [(PARAMS, 1, 1), (GROUPED, 4, 0), (GROUPED, 4, 1)]
)
def test_without_an_output_matrix_the_model_is_tied(
    params: dict[str, Any],
    count: int,
    embedding_axis: int,
    tmp_path: Path,
    tiny_tokenizer_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = meta_weights(params)
    weights["output.weight"] = weights["tok_embeddings.weight"]
    split = (params, weights, count, embedding_axis)
    untied = import_meta(write_meta(tmp_path / "untied", tiny_tokenizer_dir, *split))
    assert "LM head is the embedding" not in capsys.readouterr().out
    del weights["output.weight"]
    tied = import_meta(write_meta(tmp_path / "tied", tiny_tokenizer_dir, *split))
    assert "no output.weight: the LM head is the embedding" in capsys.readouterr().out
    assert json.loads((tied / "config.json").read_text())["tie_word_embeddings"] is True
    both = tensors_of(tied), tensors_of(untied)
    assert both[1].keys() - both[0].keys() == {"lm_head.weight"}
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (tied, untied)]
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(models[0](ids).logits, models[1](ids).logits)


def test_several_files_have_an_index_that_transformers_reads(grouped: Path, tmp_path: Path) -> None:
    one = import_meta(grouped, tmp_path / "one")
    # 18,600 bytes of embedding: the largest tensor has a file of its own.
    many = import_meta(grouped, tmp_path / "many", max_file_bytes=10_000)
    assert len(list(many.glob("model-*-of-*.safetensors"))) > 3
    assert_equal(tensors_of(many), tensors_of(one))
    model = AutoModelForCausalLM.from_pretrained(many, dtype="auto")
    assert model.dtype == torch.float16
    state = {name: tensor for name, tensor in model.state_dict().items()}
    assert_equal(state, tensors_of(one))


def test_files_are_filled_up_to_the_limit(tmp_path: Path) -> None:
    values = {"a": 2, "b": 2, "c": 2, "f": 1, "d": 9, "e": 1}  # numbers of 2 bytes each
    made: list[str] = []

    def tensor(name: str) -> torch.Tensor:
        made.append(name)
        return torch.full((values[name],), len(made), dtype=torch.bfloat16)

    shapes = {name: (count,) for name, count in values.items()}
    files = write_model(tmp_path, shapes, torch.bfloat16, tensor, max_bytes=8)
    assert [sorted(load_file(file)) for file in files] == [["a", "b"], ["c", "f"], ["d"], ["e"]]
    assert files[2].name == "model-00003-of-00004.safetensors" and made == [*"abcfde"]
    assert torch.equal(load_file(files[2])["d"], torch.full((9,), 5, dtype=torch.bfloat16))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    places = {name: file.name for file in files for name in load_file(file)}
    assert index == {"metadata": {"total_size": 34}, "weight_map": places}
    (alone,) = write_model(tmp_path, shapes, torch.bfloat16, tensor, max_bytes=34)
    assert alone.name == "model.safetensors" and sorted(load_file(alone)) == [*"abcdef"]


def test_dtype_is_converted_on_request(grouped: Path, tmp_path: Path) -> None:
    kept = tensors_of(import_meta(grouped, tmp_path / "kept"))
    assert (
        cli.main(["import", str(grouped), "--out", str(tmp_path / "a"), "--dtype", "float32"]) == 0
    )
    assert_equal(tensors_of(tmp_path / "a"), {n: t.float() for n, t in kept.items()})
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "float32"


def test_positions_are_given_assumed_or_read(
    grouped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def positions(out: Path) -> int:
        return json.loads((out / "config.json").read_text())["max_position_embeddings"]

    assert positions(import_meta(grouped, tmp_path / "a")) == 2048
    assert "2048 tokens assumed" in capsys.readouterr().out
    assert positions(import_meta(grouped, tmp_path / "b", max_positions=12)) == 12
    change_params(grouped, max_seq_len=99)
    assert positions(import_meta(grouped, tmp_path / "c")) == 99
    assert "assumed" not in capsys.readouterr().out


def test_tokenizer_may_lie_above_as_the_download_puts_it(grouped: Path, tmp_path: Path) -> None:
    (grouped / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    out = import_meta(grouped)
    assert AutoTokenizer.from_pretrained(out)("Anna").input_ids[0] == 1
    assert (out / "tokenizer.model").is_file()


def change_params(folder: Path, **changes: Any) -> None:
    file = folder / "params.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_shard(folder: Path, number: int, **changes: torch.Tensor) -> None:
    file = folder / f"consolidated.{number:02d}.pth"
    content = dict(torch.load(file))
    for name, tensor in changes.items():
        assert name in content
        content[name] = tensor
    torch.save(content, file)


def lose_tensor(folder: Path, number: int, name: str) -> None:
    file = folder / f"consolidated.{number:02d}.pth"
    content = dict(torch.load(file))
    del content[name]
    torch.save(content, file)


def lose(folder: Path, *numbers: int) -> None:
    for number in numbers:
        (folder / f"consolidated.{number:02d}.pth").unlink()


def cut_off(folder: Path) -> None:
    file = folder / "consolidated.02.pth"
    file.write_bytes(file.read_bytes()[:-300])


def hide_code(folder: Path) -> None:
    content = {"norm.weight": shard_files}  # a function: pickled by its name
    (folder / "consolidated.01.pth").write_bytes(pickle.dumps(content))
    torch.save(content, folder / "consolidated.01.pth")


def checklist(folder: Path) -> None:
    sums = [f"{'0' * 32}  consolidated.03.pth", f"{'1' * 32}  other"]
    (folder / "checklist.chk").write_text("\n".join(sums) + "\n")


DIM, NORM = GROUPED["dim"], "layers.1.ffn_norm.weight"
DAMAGES = {
    "last shards lost": (
        lambda f: lose(f, 2, 3),
        "2 of 4 files: .* has 8 rows in .*, of 32 in all; .* to consolidated.03.pth",
    ),
    "middle shard lost": (lambda f: lose(f, 1), r"consolidated.01.pth missing; there: consol"),
    "no shard": (lambda f: lose(f, 0, 1, 2, 3), "no consolidated.00.pth"),
    "one shard too many": (
        lambda f: shutil.copyfile(f / "consolidated.00.pth", f / "consolidated.04.pth"),
        "5 of 4 files",
    ),
    "cut off": (cut_off, r"consolidated.02.pth: cut off, damaged"),
    "empty": (lambda f: (f / "consolidated.02.pth").write_bytes(b""), r"02.pth: cut off, damaged"),
    "code": (hide_code, r"01.pth: holds other things than tensors"),
    "fewer layers": (lambda f: change_params(f, n_layers=1), "no place for, such as layers.1"),
    "more layers": (lambda f: change_params(f, n_layers=3), "lacks layers.2.attention.wq"),
    "other width": (
        lambda f: change_params(f, dim=64),
        "dim 64 in params.json, 32 channels in norm.weight",
    ),
    "other key heads": (
        lambda f: change_params(f, n_kv_heads=8),
        r"attention.wk.weight has shape \(4, 32\).*\(8, 32\), in 4 files",
    ),
    "other ffn": (lambda f: change_params(f, ffn_dim_multiplier=2.0), r"w1.weight has shape"),
    "other vocabulary": (lambda f: change_params(f, vocab_size=400), r"tok_embeddings.*\(400, 8\)"),
    "other theta": (lambda f: change_params(f, rope_theta=1e6), "not those of rope_theta 1e.06"),
    "scaled rope": (lambda f: change_params(f, use_scaled_rope=1), "must be true or false, not 1"),
    "unknown key": (lambda f: change_params(f, moe=8), "unknown keys moe"),
    "heads": (lambda f: change_params(f, n_heads=5), "dim 32 is not an even multiple of n_heads 5"),
    "kv heads": (lambda f: change_params(f, n_kv_heads=3), "multiple of n_kv_heads 3"),
    "no number": (lambda f: change_params(f, norm_eps="small"), "norm_eps must be a number"),
    "infinite": (lambda f: change_params(f, dim=math.inf), "dim must be a number above 0"),
    "no JSON": (lambda f: (f / "params.json").write_text("{"), "params.json: not JSON"),
    "no params": (lambda f: (f / "params.json").unlink(), "no params.json"),
    "mixed checkpoints": (
        lambda f: change_shard(f, 2, **{NORM: torch.ones(DIM, dtype=torch.float16)}),
        rf"02.pth: {NORM} differs from that of consolidated.00.pth",
    ),
    "mixed types": (
        lambda f: change_shard(f, 1, **{"output.weight": torch.ones(75, DIM)}),
        "tensors of the types float16, float32; choose one with --dtype",
    ),
    "integers": (
        lambda f: change_shard(f, 1, **{"output.weight": torch.ones(75, DIM, dtype=torch.int8)}),
        "output.weight of 1 is torch.int8",
    ),
    "NaN": (
        lambda f: change_shard(
            f, 3, **{"output.weight": torch.full((75, DIM), math.nan, dtype=torch.float16)}
        ),
        "output.weight holds NaN",
    ),
    "a part of the head lost": (
        lambda f: lose_tensor(f, 2, "output.weight"),
        "02.pth: lacks output",
    ),
    "the embedding lost": (
        lambda f: lose_tensor(f, 0, "tok_embeddings.weight"),
        "00.pth: lacks tok_embeddings.weight",
    ),
    "other MD5": (checklist, "consolidated.03.pth: damaged: its MD5"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "no tokenizer.model there or in"),
    "other tokenizer": (
        lambda f: (f / "tokenizer.model").write_text("what is this\n"),
        "neither a SentencePiece model nor tiktoken's lines",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_leaves_nothing(
    damage: str, grouped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = DAMAGES[damage]
    change(grouped)
    before = sorted(grouped.parent.rglob("*"))
    with pytest.raises(ValueError, match=message):
        import_meta(grouped)
    assert sorted(grouped.parent.rglob("*")) == before
    assert cli.main(["import", str(grouped)]) == 2
    assert capsys.readouterr().err.startswith("chatllama: ")


def test_half_precision_that_overflows_is_refused(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    weights = meta_weights(PARAMS)
    weights["output.weight"][0, 0] = 1e5
    folder = write_meta(tmp_path / "meta", tiny_tokenizer_dir, PARAMS, weights)
    with pytest.raises(ValueError, match=r"output.weight is too large for torch.float16"):
        import_meta(folder, dtype="float16")
    import_meta(folder, dtype="bfloat16")


@pytest.mark.parametrize("variant", ["not reordered", "gate and up exchanged"])
def test_the_logit_check_finds_wrong_weights(
    variant: str, grouped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variant == "not reordered":
        monkeypatch.setattr(hugging_face, "halves_together", lambda rows, heads: rows)
    else:
        names = dict(hugging_face._NAMES)
        w1, w3 = "feed_forward.w1", "feed_forward.w3"
        names[w1], names[w3] = names[w3], names[w1]
        monkeypatch.setattr(hugging_face, "_NAMES", names)
    with pytest.raises(ValueError, match="logits differ from those of Meta's architecture by"):
        import_meta(grouped)
    assert [p.name for p in grouped.parent.iterdir()] == ["meta"]


def test_an_interrupted_import_leaves_nothing(
    grouped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(hugging_face, "_check", interrupt)
    with pytest.raises(KeyboardInterrupt):
        import_meta(grouped)
    assert [p.name for p in grouped.parent.iterdir()] == ["meta"]


def test_an_existing_folder_is_kept(grouped: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="exists; name another folder with --out"):
        import_meta(grouped, tmp_path / "out")
    with pytest.raises(ValueError, match="no such folder"):
        import_meta(tmp_path / "nowhere")
