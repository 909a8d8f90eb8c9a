"""Knowledge forms one image at a time, in NumPy, from the papers' equations."""

import numpy as np


def _unit(values):
    flat = np.asarray(values, dtype=np.float64).ravel()
    return flat / np.sqrt((flat**2).sum())


def attention_map(features, power):
    return np.stack([_unit((np.abs(f) ** power).sum(axis=0)) for f in features])


def channel_gram(features):
    out = []
    for f in features:
        channels = f.shape[0]
        gram = [[(f[i] * f[j]).sum() for j in range(channels)] for i in range(channels)]
        out.append(_unit(gram))
    return np.stack(out)


def sample_similarity(features):
    rows = [_unit(f) for f in features]
    return np.stack([_unit([a @ b for b in rows]) for a in rows])


def fsp_matrix(first, second):
    out = []
    for a, b in zip(first, second, strict=True):
        out.append(_unit([[(a[i] * b[j]).sum() for j in range(len(b))] for i in range(len(a))]))
    return np.stack(out)


def kl_divergence(logits_p, logits_q):
    p, q = (np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) for z in (logits_p, logits_q))
    return (p * np.log(p / q)).sum(axis=1)
