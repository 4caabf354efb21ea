"""bge-large and Llama 2 7B, every parameter trained: the predecessor's headline pair, for pods.

    python -m rag_jax.main --config=configs/bge_large_llama2_7b.py --workdir=my_run \\
        --config.data.train=rows.parquet --config.data.eval=held_out_rows.parquet

The models come from the Hugging Face hub (15 GB; Llama 2 asks you to accept its licence first).

Cost: 7.1 billion parameters with their moments are 85 GB in float32, shared by all devices. The batch gives each of 256
devices one group; with fewer, each goes through several, one after the other. On 256 TPU v5e the compiler wants
9.4 GiB a device and a step takes 3.6 s at best; ask for other machines:

    python -m rag_jax.plan --config=configs/bge_large_llama2_7b.py --topology=h100:64

Not yet run on such a machine.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 42
    config.total_steps = 2000
    config.batch_size = 2048
    config.group_size = 8
    config.dtype = "bfloat16"
    config.matmul_precision = "default"
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
    data.query_len = 64
    data.passage_len = 256
    data.prompt_passage_len = 256
    data.prompt_query_len = 64
    data.answer_len = 64
    data.bad_rows = "drop"

    config.prompt = prompt = ConfigDict()
    prompt.passage = "{passage}"
    prompt.query = "\n\nQuestion: {query}\nAnswer:"
    prompt.answer = " {answer}"

    config.retriever = retriever = ConfigDict()
    retriever.path = "BAAI/bge-large-en"
    retriever.pooling = "auto"
    retriever.similarity = "auto"
    retriever.truncate_dim = None
    retriever.matryoshka_dims = ()
    retriever.query_prefix = "Represent this sentence for searching relevant passages: "
    retriever.passage_prefix = None
    retriever.remat = "full"
    retriever.chunk_size = 32
    retriever.base_dtype = "float32"
    retriever.lora = ConfigDict({"rank": 0, "alpha": 32.0, "scaling": "standard", "dropout": 0.0, "path": None})
    retriever.lora.targets = ("attention/", "mlp/")

    config.generator = generator = ConfigDict()
    generator.path = "meta-llama/Llama-2-7b-hf"
    generator.remat = "full"
    generator.base_dtype = "float32"
    generator.lora = ConfigDict({"rank": 0, "alpha": 32.0, "scaling": "standard", "dropout": 0.0, "path": None})
    generator.lora.targets = ("attention/", "mlp/")

    config.objective = objective = ConfigDict()
    objective.name = "token"
    objective.candidates = 8
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
    optimizer.learning_rate = 2e-5
    optimizer.schedule = "cosine"
    optimizer.warmup_steps = 100
    optimizer.weight_decay = 0.01
    optimizer.clip_norm = 1.0
    optimizer.rate_rules = ((r".*", 1.0),)
    optimizer.decay_rules = ((r"(bias|scale)$", 0.0), (r".*", 1.0))

    config.mining = ConfigDict({"every_steps": 0, "margin": 0.1, "negatives_from": "rows", "explore": 0})
    config.mesh = ConfigDict({"replica": 1, "data": -1, "model": 1})
    config.checkpoint = ConfigDict({"every_steps": 250, "every_minutes": 30.0, "keep": 2, "keep_every": 0})
    config.guard = ConfigDict({"skip_nonfinite": 0, "spike_factor": 10.0})
    config.log = ConfigDict({"every_steps": 10, "trackers": ()})
    config.eval = ConfigDict(
        {
            "every_steps": 500,
            "rows": 2000,
            "likelihoods": 0,
            "answers": 256,
            "metric": "auto",
            "patience": 0,
            "batch_size": 256,
        }
    )
    return config
