"""Checks of the metrics against ADM's evaluator."""

from __future__ import annotations

import numpy as np

from moe_diffusion.evaluation import metrics


def check(case, family: None) -> None:
    reference, generated = case["in/features_ref"], case["in/features_gen"]
    gaussians = {"ref": metrics.gaussian_of(reference), "gen": metrics.gaussian_of(generated)}
    for name, gaussian in gaussians.items():
        case.compare(f"out/mu_{name}", gaussian.mean, atol=1e-6)
        case.compare(f"out/sigma_{name}", gaussian.covariance, rtol=1e-6, atol=1e-7)
    fid = metrics.frechet_distance(gaussians["gen"], gaussians["ref"])
    case.compare("out/fid", fid, rtol=1e-6, atol=0)  # scipy's sqrtm of the product
    case.compare("out/fid_eig", fid, rtol=1e-6, atol=0)

    logits, exact = case["in/logits"], {"rtol": 1e-6, "atol": 0}
    case.compare("out/inception_score", metrics.inception_score(logits)[0], **exact)
    mean, deviation = metrics.inception_score(logits, split=100)
    case.compare("out/inception_score_split100_mean", mean, **exact)
    case.compare("out/inception_score_split100_std", deviation, **exact)

    k = case.config["params"]["k"]
    case.compare("out/radii_sq_ref", metrics.neighbour_radii(reference, k))
    case.compare("out/radii_sq_gen", metrics.neighbour_radii(generated, k))
    precision, recall = metrics.precision_recall(reference, generated, k)
    case.compare("out/precision", precision, **exact)
    case.compare("out/recall", recall, **exact)
    # The half-precision emulation tells how far ADM's own numbers stray; ours are exact.
    for name, ours in (("precision", precision), ("recall", recall)):
        np.testing.assert_allclose(case[f"info/{name}_f16"], ours, atol=0.01)
        case.seen(f"info/{name}_f16")
    case.assert_all_compared()
