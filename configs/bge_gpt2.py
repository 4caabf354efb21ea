"""The reference run: bge-small and GPT-2, with the predecessor's batch, lengths and schedule.

    python -m rag_jax.main --config=configs/bge_gpt2.py --workdir=my_run \\
        --config.data.train=rows.csv --config.data.eval=held_out_rows.csv

The models come from the Hugging Face hub (0.7 GB, once). The generator's 256 tokens are split into segments, so that a
long passage is cut and an answer never is; bge reads the instruction its makers give for queries.

Cost: about 17,000 generator tokens a step: fit for one GPU. On eight devices every one holds a group. Expected:
`eval/mrr@10` rises and `eval/answer_nll` falls from the first evaluation on.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 42
    config.total_steps = 1000
    config.batch_size = 32
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
    data.query_len = 50
    data.passage_len = 128
    data.prompt_passage_len = 160
    data.prompt_query_len = 48
    data.answer_len = 48
    data.bad_rows = "drop"

    config.prompt = prompt = ConfigDict()
    prompt.passage = "{passage}"
    prompt.query = "\n\nQuestion: {query}\nAnswer:"
    prompt.answer = " {answer}"

    config.retriever = retriever = ConfigDict()
    retriever.path = "BAAI/bge-small-en"
    retriever.pooling = "auto"
    retriever.similarity = "auto"
    retriever.truncate_dim = None
    retriever.matryoshka_dims = ()
    retriever.query_prefix = "Represent this sentence for searching relevant passages: "
    retriever.passage_prefix = None
    retriever.remat = "dots"
    retriever.chunk_size = 0
    retriever.base_dtype = "float32"
    retriever.lora = ConfigDict({"rank": 0, "alpha": 32.0, "scaling": "standard", "dropout": 0.0, "path": None})
    retriever.lora.targets = ("attention/", "mlp/")

    config.generator = generator = ConfigDict()
    generator.path = "gpt2"
    generator.remat = "dots"
    generator.base_dtype = "float32"
    generator.lora = ConfigDict({"rank": 0, "alpha": 32.0, "scaling": "standard", "dropout": 0.0, "path": None})
    generator.lora.targets = ("attention/", "mlp/")

    config.objective = objective = ConfigDict()
    objective.name = "token"
    objective.candidates = 4
    objective.candidates_from = "group"
    objective.negatives = 0
    objective.temperature = 0.01
    objective.marginal_temperature = 0.05
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
    optimizer.learning_rate = 1e-4
    optimizer.schedule = "linear"
    optimizer.warmup_steps = 100
    optimizer.weight_decay = 0.0
    optimizer.clip_norm = 1.0
    optimizer.rate_rules = ((r".*", 1.0),)
    optimizer.decay_rules = ((r"(bias|scale)$", 0.0), (r".*", 1.0))

    config.mining = ConfigDict({"every_steps": 0, "margin": 0.1, "negatives_from": "rows", "explore": 0})
    config.mesh = ConfigDict({"replica": 1, "data": -1, "model": 1})
    config.checkpoint = ConfigDict({"every_steps": 250, "every_minutes": 0.0, "keep": 2, "keep_every": 0})
    config.guard = ConfigDict({"skip_nonfinite": 0, "spike_factor": 10.0})
    config.log = ConfigDict({"every_steps": 1, "trackers": ()})
    config.eval = ConfigDict(
        {
            "every_steps": 250,
            "rows": 1000,
            "likelihoods": 0,
            "answers": 64,
            "metric": "auto",
            "patience": 0,
            "batch_size": 32,
        }
    )
    return config
