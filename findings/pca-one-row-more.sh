#!/bin/sh
# scikit-learn: one row more, and PCA of float32 features finds another direction.
#
# Guess: PCA() centres the features first, so that a common offset costs a few digits at most; 200
# rows give the same first component as 199 of them, and float32 the same as float64.
# Seen: features with standard deviations of 1, one direction of 3, at an offset of 10,000 (as
# counts of a 16-bit sensor): 199 rows of 20 features give the direction, 200 rows do not:
#     199 rows, float32: solver full,            cosine 0.99, its variance 9.6
#     200 rows, float32: solver covariance_eigh, cosine 0.11, its variance 445, no warning
#     200 rows, float64: solver covariance_eigh, cosine 0.99, its variance 9.6
# Why: since 1.5 the default, svd_solver="auto", takes "covariance_eigh" from ten rows a feature on.
# It does not centre the data, as its documentation says ("on centered data"), but subtracts
# n * mean * mean' from X'X, in the precision of X. What is left is rounding; negative eigenvalues
# are set to zero. Offsets of 100 to 300 deviations suffice for 64 features and 5,000 rows.
# It matters to who looks at features (a few channels of a transformer commonly lie far from zero)
# or raw sensor values in float32: a small trial is right, the full data set is wrong. Remedies:
# subtract the mean first, pass float64, or svd_solver="full".
# Versions: scikit-learn 1.9.1, numpy 2.4.6, Python 3.11, Linux, on a CPU. Date: 2026-11-27.
# It ends with 1 where this is no longer so.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet scikit-learn==1.9.1 numpy==2.4.6
"$place/venv/bin/python" - <<'END'
import numpy as np
import sklearn
from sklearn.decomposition import PCA

print("scikit-learn", sklearn.__version__, "numpy", np.__version__)
random = np.random.default_rng(0)
direction = random.normal(size=20)
direction /= np.linalg.norm(direction)
features = random.normal(size=(200, 20)) + 3 * random.normal(size=(200, 1)) * direction


def cosine(x):
    pca = PCA().fit(x)
    found = abs(pca.components_[0] @ direction)
    first, last = pca.explained_variance_[[0, -1]]
    print(f"{len(x)} rows, {x.dtype}, mean {x.mean():.0f}, solver {pca._fit_svd_solver}:", end=" ")
    print(f"|cosine| {found:.3f}, first variance {first:.2f}, last {last:.2f}")
    return found


moved = (features + 10_000).astype(np.float32)
centred = moved - moved.mean(0, dtype=np.float64).astype(np.float32)
few = cosine(moved[:199])
more = cosine(moved)
double = cosine(moved.astype(np.float64))
by_hand = cosine(centred)
right = min(few, double, by_hand)
raise SystemExit(0 if right > 0.95 and more < 0.8 else 1)
END
