"""Two tiny random models on a few rows: every part of a run, in seconds, without a download.

    python -m rag_jax.main --config=configs/tiny.py --workdir=/tmp/tiny

Cost: nearly all of it is compilation. Result: `loss/total` falls; the models are random and byte-level, so the numbers
mean nothing else.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.total_steps = 20
    config.batch_size = 8
    config.group_size = 4
    config.dtype = "float32"
    config.matmul_precision = "highest"
    config.attention = "auto"
    config.kernels = "deterministic"
    config.dropout = None

    config.data = data = ConfigDict()
    data.train = "tests/data/rows.csv"
    data.eval = "tests/data/rows.csv"
    data.passages = None
    data.columns = columns = ConfigDict({"query": "Question", "passage": "Abstract", "answer": "Answer"})
    columns.update({"negative": None, "document": None, "passage_score": None, "negative_score": None})
    data.eval_columns = dict.fromkeys(("query", "passage", "answer", "document"))
    data.passages_columns = dict.fromkeys(("passage", "document"))
    data.format = "auto"
    data.query_len = 32
    data.passage_len = 64
    data.prompt_passage_len = 64
    data.prompt_query_len = 64
    data.answer_len = 64
    data.bad_rows = "drop"

    config.prompt = prompt = ConfigDict()
    prompt.passage = "{passage}"
    prompt.query = "\n\nQuestion: {query}\nAnswer:"
    prompt.answer = " {answer}"

    config.retriever = retriever = ConfigDict()
    retriever.path = "random:bert"
    retriever.pooling = "auto"
    retriever.similarity = "auto"
    retriever.truncate_dim = None
    retriever.matryoshka_dims = ()
    retriever.query_prefix = None
    retriever.passage_prefix = None
    retriever.remat = "dots"
    retriever.chunk_size = 0
    retriever.base_dtype = "float32"
    retriever.lora = ConfigDict({"rank": 0, "alpha": 32.0, "scaling": "standard", "dropout": 0.0, "path": None})
    retriever.lora.targets = ("attention/", "mlp/")

    config.generator = generator = ConfigDict()
    generator.path = "random:gpt2"
    generator.remat = "dots"
    generator.base_dtype = "float32"
    generator.lora = ConfigDict({"rank": 0, "alpha": 32.0, "scaling": "standard", "dropout": 0.0, "path": None})
    generator.lora.targets = ("attention/", "mlp/")

    config.objective = objective = ConfigDict()
    objective.name = "token"
    objective.candidates = 3
    objective.candidates_from = "group"
    objective.negatives = 0
    objective.temperature = 0.05
    objective.marginal_temperature = 0.2
    objective.contrastive_weight = 1.0
    objective.document_weight = 0.0
    objective.marginal_weight = 1.0
    objective.evidence = "answer"
    objective.evidence_temperature = 0.1
    objective.evidence_weight = 1.0
    objective.kept_evidence = "auto"
    objective.label_noise = None
    objective.label_share = 0.0

    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 3e-3
    optimizer.schedule = "linear"
    optimizer.warmup_steps = 2
    optimizer.weight_decay = 0.01
    optimizer.clip_norm = 1.0
    optimizer.rate_rules = ((r".*", 1.0),)
    optimizer.decay_rules = ((r"(bias|scale)$", 0.0), (r".*", 1.0))

    config.mining = ConfigDict({"every_steps": 0, "margin": 0.1, "negatives_from": "rows", "explore": 0})
    config.mesh = ConfigDict({"replica": 1, "data": -1, "model": 1})
    config.checkpoint = ConfigDict({"every_steps": 10, "every_minutes": 0.0, "keep": 2, "keep_every": 0})
    config.guard = ConfigDict({"skip_nonfinite": 0, "spike_factor": 0.0})
    config.log = ConfigDict({"every_steps": 1, "trackers": ()})
    config.eval = ConfigDict(
        {"every_steps": 10, "rows": 0, "likelihoods": 0, "answers": 4, "metric": "auto", "patience": 0, "batch_size": 8}
    )
    return config
