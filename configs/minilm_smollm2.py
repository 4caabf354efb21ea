"""MiniLM and SmolLM2-135M, a real pair that fits a laptop, on your own rows.

    make quickstart        # once: leaves the two models in quickstart/models
    python -m rag_jax.main --config=configs/minilm_smollm2.py --workdir=my_run \\
        --config.data.train=my_rows.csv --config.data.eval=my_held_out_rows.csv

The file needs columns Question, Abstract and Answer, or `--config.data.columns.query=...` and so on. Hub names work as
models too: sentence-transformers/all-MiniLM-L6-v2 and HuggingFaceTB/SmolLM2-135M are this pair.

The retriever alone, as one epoch of sentence-transformers' MultipleNegativesRankingLoss would (steps: rows / 32):

    python -m rag_jax.main --config=configs/minilm_smollm2.py --workdir=my_retriever \\
        --config.data.train=my_rows.csv --config.data.eval=my_held_out_rows.csv --config.eval.rows=0 \\
        --config.objective.name=none --config.generator.path=None --config.total_steps=181 \\
        --config.batch_size=32 --config.group_size=32 --config.data.query_len=256 --config.data.passage_len=256 \\
        --config.optimizer.learning_rate=2e-5 --config.optimizer.warmup_steps=0 --config.optimizer.weight_decay=0

Cost: about 6,000 generator tokens a step: fit for one GPU, patience on a CPU. Expected: held-out answer NLL falls.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.total_steps = 100
    config.batch_size = 16
    config.group_size = 4
    config.dtype = "float32"
    config.matmul_precision = "highest"
    config.attention = "auto"
    config.kernels = "deterministic"
    config.dropout = None

    config.data = data = ConfigDict()
    data.train = None
    data.eval = None
    data.passages = None
    data.columns = columns = ConfigDict({"query": "Question", "passage": "Abstract", "answer": "Answer"})
    columns.update({"negative": None, "document": None, "passage_score": None, "negative_score": None})
    data.eval_columns = dict.fromkeys(("query", "passage", "answer", "document"))
    data.passages_columns = dict.fromkeys(("passage", "document"))
    data.format = "auto"
    data.query_len = 48
    data.passage_len = 256
    data.prompt_passage_len = 192
    data.prompt_query_len = 48
    data.answer_len = 48
    data.bad_rows = "drop"

    config.prompt = prompt = ConfigDict()
    prompt.passage = "{passage}"
    prompt.query = "\n\nQuestion: {query}\nAnswer:"
    prompt.answer = " {answer}"

    config.retriever = retriever = ConfigDict()
    retriever.path = "quickstart/models/minilm"
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
    generator.path = "quickstart/models/smollm2-135m"
    generator.remat = "dots"
    generator.base_dtype = "float32"
    generator.lora = ConfigDict({"rank": 0, "alpha": 32.0, "scaling": "standard", "dropout": 0.0, "path": None})
    generator.lora.targets = ("attention/", "mlp/")

    config.objective = objective = ConfigDict()
    objective.name = "token"
    objective.candidates = 2
    objective.candidates_from = "group"
    objective.negatives = 0
    objective.temperature = 0.05
    objective.marginal_temperature = 0.1
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
    optimizer.learning_rate = 5e-5
    optimizer.schedule = "linear"
    optimizer.warmup_steps = 10
    optimizer.weight_decay = 0.01
    optimizer.clip_norm = 1.0
    optimizer.rate_rules = ((r".*", 1.0),)
    optimizer.decay_rules = ((r"(bias|scale)$", 0.0), (r".*", 1.0))

    config.mining = ConfigDict({"every_steps": 0, "margin": 0.1, "negatives_from": "rows", "explore": 0})
    config.mesh = ConfigDict({"replica": 1, "data": -1, "model": 1})
    config.checkpoint = ConfigDict({"every_steps": 25, "every_minutes": 0.0, "keep": 2, "keep_every": 0})
    config.guard = ConfigDict({"skip_nonfinite": 0, "spike_factor": 10.0})
    config.log = ConfigDict({"every_steps": 1, "trackers": ()})
    config.eval = ConfigDict(
        {
            "every_steps": 50,
            "rows": 200,
            "likelihoods": 0,
            "answers": 16,
            "metric": "auto",
            "patience": 0,
            "batch_size": 16,
        }
    )
    return config
