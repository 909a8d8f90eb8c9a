"""The report: what ``clean`` left in a folder, as one page that opens anywhere.

:func:`write_report` reads ``DIR/report.json`` and, where they exist, pictures in ``DIR/report/``, and writes
``DIR/report.html``. What is optional may be missing, then its part of the page is left out; unknown keys are ignored.

``report.json``, all shares and probabilities in [0, 1]::

    accuracy     suspicious, cleaned, and optional teacher: each {value, standard_error, images} and optional
                 held_out (bool: none of these images was in a fit) and
                 per_class, a list of {class, value, images, optional standard_error}
    scan         optional before and after: each {classes, optional verdict, optional level (0.05)}; classes is
                 {method: [{class, statistic, p_value}, ...]}, or one list whose rows name their method too;
                 verdict is a sentence, or {method: sentence}; p-values are adjusted for the number of classes
    chosen       optional {optimiser, rate, steps, batch, layers, ...}, any plain values, and
                 reasons: {one of these names: why, as a sentence}
    weights      optional {file, handed_over (bool), optional: reason and next (sentences, of a rejected network),
                 network (class path), arguments (its keyword arguments), mean, std, size (what the network expects)}
    warnings     optional list of sentences
    curves       optional list of {fit (its name), epoch, ...}; names with "acc" in them are shares, names with "loss"
                 in them are losses, others are ignored
    classes      optional names in the network's order; where a ``class`` is a number, it counts in them
    versions, provenance   optional {name: plain value}
    seconds, seed          optional numbers

``report/pseudo.safetensors``, the strongest first: ``images`` and ``perturbed``, `(N, C, H, W)` uint8, C = 1 or 3; and
``report/pseudo.json``::

    {samples: N of {class, suspicious, cleaned, optional teacher, target, source}}

where ``class`` is the true one, ``target`` the one it was searched for, ``source`` how it was found (``universal``),
and each network's answer to the perturbed image is {class, optional probability}.

``report/attention.safetensors``: ``images`` `(N, C, H, W)` uint8, and ``suspicious``, ``cleaned``, optional
``teacher``, `(N, h, w)` float, at least 0, of any scale (each map is drawn relative to its own largest value); and
``report/attention.json``, of the same form as ``pseudo.json``, with an optional ``layer`` beside ``samples``, and an
optional ``caption`` in each sample ("clean", "pseudo sample").
"""
