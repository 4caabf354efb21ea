"""Runs that train adapters: what they leave alone, what a checkpoint holds, going on, exporting; tiny models."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from command import TINY, call, run_here

import rag_jax
from rag_jax import config, hf, models, pair
from rag_jax.models import adapters
from rag_jax.training import optim, setup
from rag_jax.workdir import checkpoint, untrained

LORA = {
    "generator__lora__rank": 4, "retriever__lora__rank": 2, "retriever__lora__scaling": "rank_stabilised",
    "generator__lora__dropout": 0.1, "total_steps": 4, "eval__every_steps": 4, "checkpoint__every_steps": 2,
    "checkpoint__keep": 9, "eval__answers": 0,
    "optimizer__rate_rules": "(('norm/', 0.5), ('generator/', 2.0), ('.*', 1.0))",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tiny_run, tmp_path_factory):
    """A run of four steps that trains adapters and norms, what it printed, and the cache of its models."""
    workdir, cache = tmp_path_factory.mktemp("adapters") / "run", tiny_run[2]
    printed = run_here(cache, "main", f"--config={TINY}", f"--workdir={workdir}", **LORA)
    return workdir, printed, cache


@pytest.fixture(autouse=True)
def of_cache(made, monkeypatch):
    monkeypatch.setenv("RAG_JAX_CACHE", str(made[2]))


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def params_at(workdir, step):
    opened = pair.open_pair(config.load_workdir(workdir), workdir)
    return named(setup.saved_params(opened, workdir, step)[1])


def arrays(workdir, step, item):
    """What the checkpoint itself holds."""
    with checkpoint.Checkpoints(workdir) as checkpoints:
        return checkpoints.paths(step, item)


def test_only_adapters_and_what_a_rule_names_alone_are_trained_and_saved(made):
    workdir, printed, _ = made
    before = named(pair.pretrained_params(pair.open_pair(config.load_workdir(workdir))))
    after = params_at(workdir, 4)
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    expected = {path for path in before if adapters.is_adapter(path) or "norm/" in path}
    assert changed == expected == arrays(workdir, 4, "params")
    assert untrained.read(workdir).keys() == before.keys() - expected
    # B begins at zero, and A as PEFT's does.
    for path, value in before.items():
        assert not path.endswith("lora_b") or not value.any()
        if path.endswith("lora_a"):
            assert 0.8 / np.sqrt(value.shape[1]) < np.abs(value).max() <= 1 / np.sqrt(value.shape[1])
    assert "retriever  random:bert (bert), 0.1 M parameters, 4% trained (adapters of rank 2 on 6 of 6" in printed
    assert "(adapters of rank 4 on 6 of 6 linear layers, and 6 arrays of its own)" in printed


def test_a_stopped_run_goes_on_to_the_same_bits(made, tmp_path):
    workdir, _, cache = made
    again = tmp_path / "run"
    shutil.copytree(workdir, again)
    shutil.rmtree(again / "checkpoints" / "4")
    run_here(cache, "main", f"--config={TINY}", f"--workdir={again}", **LORA)
    first, second = params_at(workdir, 4), params_at(again, 4)
    assert first.keys() == second.keys()
    for path, value in first.items():
        np.testing.assert_array_equal(value, second[path], path)
    losses = [
        [json.loads(line).get("loss/total") for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (workdir, again)
    ]
    assert losses[0] == losses[1]


def test_a_changed_base_is_refused_and_a_moved_one_is_found(made, tmp_path, monkeypatch):
    workdir, _, cache = made
    source = hf.open_model("random:gpt2", "generator.path", "generator")
    base = tmp_path / "base"
    shutil.copytree(source.folder, base)
    expected = params_at(workdir, 4)
    loaded = config.load_workdir(workdir, {"generator.path": str(base)})
    got = named(setup.saved_params(pair.open_pair(loaded, workdir), workdir, 4)[1])
    for path, value in expected.items():
        np.testing.assert_array_equal(got[path], value)
    params = hf.load_params(base, "gpt2", source.model_config)
    params["layers"]["mlp"]["up"]["kernel"][1, 3, 5] += 1e-6
    hf.save_model(source, params, tmp_path / "other")
    code, _, err = call(
        cache, "export", f"--workdir={workdir}", f"--out={tmp_path / 'out'}", generator__path=tmp_path / "other"
    )
    assert code == 2 and err.count("\n") == 1
    assert "holds other weights than" in err and "(generator/layers/mlp/up/kernel)" in err
    assert "--config.generator.path=DIR" in err


def test_exports_of_adapters_and_of_merged_models_say_the_same(made, tmp_path):
    workdir, _, cache = made
    texts = ["what does a goose say?", "the sea"]
    run = rag_jax.load(workdir)
    expected = run.embed_queries(texts)
    for flags in (["--adapters"], []):
        out = tmp_path / f"out{len(flags)}"
        printed = run_here(cache, "export", f"--workdir={workdir}", f"--out={out}", *flags)
        assert "moved      23 passages of data.train: cosine with the base's embeddings 0." in printed
        again = rag_jax.load(out)
        if flags:
            np.testing.assert_array_equal(again.embed_queries(texts), expected)
            params = named(again.params)
            assert all(np.array_equal(value, params[path]) for path, value in params_at(workdir, 4).items())
        else:
            np.testing.assert_allclose(again.embed_queries(texts), expected, atol=1e-5)
    names = {path.name for path in (tmp_path / "out1" / "generator").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= names
    assert not names & {"config.json", "model.safetensors"}
    assert "AutoPeftModelForCausalLM" in (tmp_path / "out1" / "generator" / "README.md").read_text()
    assert not (tmp_path / "out0" / "generator" / "adapter_config.json").exists()


@pytest.mark.slow
def test_others_load_exported_adapters(made, tmp_path):
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("peft")
    import sentence_transformers
    import transformers

    workdir, _, cache = made
    run_here(cache, "export", f"--workdir={workdir}", f"--out={tmp_path / 'alone'}", "--adapters")
    run_here(cache, "export", f"--workdir={workdir}", f"--out={tmp_path / 'merged'}")
    texts = ["what does a goose say?", "the sea"]
    got, expected = (
        sentence_transformers.SentenceTransformer(str(tmp_path / name / "retriever")).encode(texts)
        for name in ("alone", "merged")
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(got, rag_jax.load(workdir).embed_queries(texts), atol=1e-5)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        got, expected = (
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name / "generator")(ids).logits
            for name in ("alone", "merged")
        )
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_training_goes_on_from_an_exported_adapter(made, tmp_path):
    workdir, _, cache = made
    out = tmp_path / "out"
    run_here(cache, "export", f"--workdir={workdir}", f"--out={out}", "--adapters")
    values = {
        "generator__path": str(out / "generator"), "retriever__lora__path": str(out / "retriever"), "total_steps": 1,
        "optimizer__rate_rules": LORA["optimizer__rate_rules"],
        "eval__every_steps": 0,
    }  # fmt: skip
    printed = run_here(cache, "main", f"--config={TINY}", f"--workdir={tmp_path / 'next'}", **values)
    assert "adapters of rank 4" in printed and "adapters of rank 2" in printed
    begun = named(
        pair.pretrained_params(pair.open_pair(config.load(TINY, {k.replace("__", "."): v for k, v in values.items()})))
    )
    for path, value in params_at(workdir, 4).items():
        np.testing.assert_array_equal(begun[path], value, path)
    # The run's folder does without the adapters' folder, but not without the base.
    shutil.rmtree(out)
    assert params_at(tmp_path / "next", 1).keys() == begun.keys()


SMALL = LORA | {
    "generator__base_dtype": "int4", "retriever__base_dtype": "int8", "total_steps": 2, "checkpoint__every_steps": 2,
    "generator__lora__dropout": 0.0, "eval__every_steps": 2, "optimizer__rate_rules": "(('.*', 1.0),)",
}  # fmt: skip


def test_small_bases_train_on_one_device_and_on_four_alike_and_go_on(made, tmp_path):
    cache = made[2]
    one, four = tmp_path / "one", tmp_path / "four"
    run_here(cache, "main", f"--config={TINY}", f"--workdir={one}", **SMALL)
    printed = run_here(
        cache, "main", f"--config={TINY}", f"--workdir={four}", devices=4, mesh__data=2, mesh__model=2, **SMALL
    )
    assert "int4 base" in printed and "int8 base" in printed
    losses = [
        [json.loads(line).get("loss/total") for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (one, four)
    ]
    np.testing.assert_allclose(*(np.array(each, float) for each in losses), rtol=1e-5)
    first, second = params_at(one, 2), params_at(four, 2)
    codes = {path for path in first if path.endswith("/codes")}
    assert len(codes) == 12 and {first[path].dtype.name for path in codes} == {"int8", "uint8"}
    for path, value in first.items():
        # Adam's first steps are as long for a gradient that is next to nothing.
        np.testing.assert_allclose(second[path], value, atol=1e-4)
    assert not any("codes" in path or "scales" in path for path in arrays(one, 2, "params"))
    # What is evaluated again is what the run said, and a merged export is what the run computed with.
    told = json.loads(run_here(cache, "evaluate", f"--workdir={one}", "--json").splitlines()[-1])
    in_run = json.loads((one / "eval" / "step_2.json").read_text())
    assert told["eval/answer_nll"] == pytest.approx(in_run["eval/answer_nll"], abs=1e-6)
    run_here(cache, "export", f"--workdir={one}", f"--out={tmp_path / 'out'}")
    texts = ["what does a goose say?"]
    expected = rag_jax.load(one).embed_queries(texts)
    np.testing.assert_allclose(rag_jax.load(tmp_path / "out").embed_queries(texts), expected, atol=1e-5)


BOTH = {
    "retriever__path": "random:llama", "generator__path": "random:llama", "retriever__pooling": "last",
    "generator__lora__rank": 3, "retriever__lora__rank": 2, "total_steps": 3, "eval__every_steps": 0,
    "checkpoint__every_steps": 1, "checkpoint__keep": 9,
    "optimizer__rate_rules": "(('retriever/.*norm/', 1.0), ('.*', 1.0))",
}  # fmt: skip


def test_one_base_with_two_adapters_is_held_once(made, tmp_path):
    """It trains as two copies of the base do, goes on to the same bits, and each role is exported by itself."""
    cache = made[2]
    shared, apart = tmp_path / "shared", tmp_path / "apart"
    printed = run_here(cache, "main", f"--config={TINY}", f"--workdir={shared}", **BOTH)
    assert "on the generator's weights" in printed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair, "shares_base", lambda config, sources: False)
        printed = run_here(cache, "main", f"--config={TINY}", f"--workdir={apart}", **BOTH)
    assert "on the generator's weights" not in printed
    losses = [
        [json.loads(line).get("loss/total") for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (shared, apart)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    # The retriever's norms are its own; all else of it that is frozen is the generator's.
    once, twice = untrained.read(shared), untrained.read(apart)
    assert once.items() <= twice.items()
    assert {path for path in twice if path.startswith("retriever/")} == twice.keys() - once.keys()
    opened = pair.open_pair(config.load_workdir(shared), shared)
    _, params = setup.saved_params(opened, shared, 3)
    kernels = [params[role]["layers"]["mlp"]["up"]["kernel"] for role in ("retriever", "generator")]
    assert kernels[0] is kernels[1]
    first, second = named(params), params_at(apart, 3)
    assert first.keys() == second.keys()
    for path, value in first.items():
        np.testing.assert_array_equal(value, second[path], path)
    shutil.rmtree(shared / "checkpoints" / "3")
    shutil.rmtree(shared / "checkpoints" / "2")
    run_here(cache, "main", f"--config={TINY}", f"--workdir={shared}", **BOTH)
    for path, value in params_at(shared, 3).items():
        np.testing.assert_array_equal(value, second[path], path)
    run_here(cache, "export", f"--workdir={shared}", f"--out={tmp_path / 'out'}", "--adapters")
    again = rag_jax.load(tmp_path / "out")
    texts = ["what does a goose say?"]
    np.testing.assert_array_equal(again.embed_queries(texts), rag_jax.load(shared).embed_queries(texts))
    bases = {
        json.loads((tmp_path / "out" / role / "adapter_config.json").read_text())["base_model_name_or_path"]
        for role in ("retriever", "generator")
    }
    assert len(bases) == 1


@pytest.mark.slow
def test_one_base_with_two_adapters_on_four_devices(made, tmp_path):
    values = BOTH | {"generator__base_dtype": "int8", "retriever__base_dtype": "int8", "total_steps": 2}
    losses = []
    for devices, mesh in ((1, {}), (4, {"mesh__data": 2, "mesh__model": 2})):
        workdir = tmp_path / str(devices)
        run_here(made[2], "main", f"--config={TINY}", f"--workdir={workdir}", devices=devices, **values, **mesh)
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss/total"] for line in lines if "loss/total" in line])
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"generator__lora__rank": -1}, "generator.lora.rank=-1: must be at least 0"),
        ({"generator__lora__rank": 4096}, "wide, so that a rank above it holds nothing more; lower it"),
        (
            {"generator__lora__rank": 2, "generator__lora__targets": "('q_proj',)"},
            "'q_proj' is found in no layer; there",
        ),
        ({"generator__lora__targets": "('(',)"}, "is not a regular expression"),
        ({"generator__lora__targets": "()"}, "must name a layer at least"),
        ({"generator__lora__targets": "attention"}, "must be texts such as ('attention/', 'mlp/')"),
        ({"generator__lora__rank": 2, "generator__lora__targets": "('query',)"}, "adapted together or not at all"),
        ({"generator__base_dtype": "int4"}, "generator.base_dtype=int4: is of weights that are not trained, and"),
        ({"generator__base_dtype": "int3"}, "must be one of float32, bfloat16, int8, int4, uint4"),
        ({"retriever__lora__path": "nowhere"}, "retriever.lora.path='nowhere'"),
        ({"retriever__lora__alpha": 0}, "retriever.lora.alpha=0.0: must be greater than 0"),
        ({"retriever__lora__scaling": "rslora"}, "must be one of standard, rank_stabilised"),
        ({"retriever__lora__dropout": 1}, "retriever.lora.dropout=1.0: must be at least 0 and less than 1"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(made, tmp_path, values, message):
    code, _, err = call(made[2], "main", f"--config={TINY}", f"--workdir={tmp_path / 'run'}", **values)
    assert code == 2 and err.count("\n") == 1, err
    assert message in err and not (tmp_path / "run").exists()


def test_an_adapter_of_another_base_or_rank_is_refused(made, tmp_path):
    workdir, _, cache = made
    out = tmp_path / "out"
    run_here(cache, "export", f"--workdir={workdir}", f"--out={out}", "--adapters")
    run = (f"--config={TINY}", f"--workdir={tmp_path / 'run'}")
    code, _, err = call(cache, "main", *run, generator__lora__path=out / "retriever")
    assert code == 2 and "is no linear layer of this base" in err and err.count("\n") == 1
    code, _, err = call(cache, "main", *run, generator__path="random:llama", generator__lora__path=out / "generator")
    assert code == 2 and "is no linear layer of this base" in err
    code, _, err = call(cache, "main", *run, generator__path=out / "generator", generator__lora__rank=8)
    assert code == 2 and "has rank 4 and a scale of 8; leave the rank at 0" in err
    code, _, err = call(cache, "main", *run, generator__lora__path=pathlib.Path(TINY).parent)
    assert code == 2 and "holds no adapter_config.json; give the folder of an adapter (PEFT)" in err


def test_a_rule_that_covers_adapters_leaves_their_base_alone():
    lora = models.Lora(2, 4.0, ("attention/",))
    bert = models.BertConfig(50, 2, 2, 8, 16, 64, 2, 1e-12, "gelu", 0.0, 0.0)
    params = {"retriever": models.abstract(models.with_lora(bert, lora))[1], "generator": models.abstract(bert)[1]}

    def trained(*rules):
        rates = optim.multipliers(params, optim.with_adapters(rules, params))
        return {path: rate for path, rate in named(rates).items() if rate}

    everything = trained((".*", 1.0))
    assert {path for path in everything if path.startswith("retriever/")} == {
        f"retriever/layers/attention/{layer}/{leaf}"
        for layer in ("query", "key", "value", "out")
        for leaf in adapters.LEAVES
    }
    assert {path for path in everything if path.startswith("generator/")} == {
        path for path in named(params) if path.startswith("generator/")
    }
    slower = trained(("retriever/", 0.1), (".*", 1.0))
    assert slower.keys() == everything.keys()
    assert {float(slower[path]) for path in slower if path.startswith("retriever/")} == {0.1}
    norms = trained(("bias$", 0.0), ("norm/", 0.5), (".*", 1.0))
    own = {path for path in norms if path.startswith("retriever/")} - everything.keys()
    scales = ("embed/norm/scale", "layers/attention_norm/scale", "layers/mlp_norm/scale")
    assert own == {f"retriever/{path}" for path in scales}
