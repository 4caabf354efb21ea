"""MiniLM learns to retrieve from questions and answers: SmolLM2-135M says which passages make the answers likely.

    make quickstart        # once: leaves the two models in quickstart/models
    python -m rag_jax.main --config=configs/minilm_smollm2_unlabelled.py --workdir=my_run \\
        --config.data.train=my_rows.csv --config.data.passages=my_passages.csv

The rows need columns Question and Answer, the passages a column Abstract, or `--config.data.columns.query=...` and so
on. If the rows name their document: `--config.data.columns.document=...`, a column of both files. If some name their
passage: `--config.objective.contrastive_weight=...`, the share of them that does. If there are no answers:
`--config.data.columns.answer=None --config.objective.evidence=question`.

The generator is frozen. What it says of a row and a passage is computed once and kept on disk, for later runs too.

Cost: on 2 CPU cores 15 minutes of evidence for 480 rows (4.3 pairs a second) and 5.5 s a step of 8 rows. Expected, on
1,440 unlabelled rows of FairytaleQA: recall@1 of held-out questions rises from .34 to .45 after 60 steps, to .48
after 180.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.total_steps = 180
    config.batch_size = 8
    config.group_size = 8
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
    data.prompt_passage_len = 256
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
    objective.name = "pdist"
    objective.candidates = 8
    objective.candidates_from = "row"
    objective.negatives = 4
    objective.temperature = 0.05
    objective.marginal_temperature = 0.05
    objective.contrastive_weight = 1.0
    objective.document_weight = 1.0
    objective.marginal_weight = 0.0
    objective.evidence = "both"
    objective.evidence_temperature = 0.1
    objective.evidence_weight = 1.0
    objective.kept_evidence = "auto"
    objective.label_noise = None
    objective.label_share = 0.5

    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 5e-5
    optimizer.schedule = "linear"
    optimizer.warmup_steps = 10
    optimizer.weight_decay = 0.01
    optimizer.clip_norm = 1.0
    optimizer.rate_rules = ((r"generator/", 0.0), (r".*", 1.0))
    optimizer.decay_rules = ((r"(bias|scale)$", 0.0), (r".*", 1.0))

    config.mining = ConfigDict({"every_steps": 60, "margin": None, "negatives_from": "rows", "explore": 0})
    config.mesh = ConfigDict({"replica": 1, "data": -1, "model": 1})
    config.checkpoint = ConfigDict({"every_steps": 20, "every_minutes": 0.0, "keep": 2, "keep_every": 0})
    config.guard = ConfigDict({"skip_nonfinite": 0, "spike_factor": 10.0})
    config.log = ConfigDict({"every_steps": 1, "trackers": ()})
    config.eval = ConfigDict(
        {
            "every_steps": 60,
            "rows": 0,
            "likelihoods": 32,
            "answers": 0,
            "metric": "auto",
            "patience": 0,
            "batch_size": 16,
        }
    )
    return config
