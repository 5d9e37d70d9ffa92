"""What the runs of a sweep share is what each would compute alone."""

import pytest
import torch
from builders import small_data

from dptaft.sweep.shared import Boundaries, memory_share, use_fastest_layout
from dptaft.training.losses import CrossEntropy
from dptaft.training.plan import ModelConfig, PerformanceConfig, PrivacyConfig, Request
from dptaft.training.preparation import build_learner

DATA = small_data(12)
TEN = small_data(20, classes=10)


def learner(seed=0, data=DATA, **model):
    return build_learner(
        data, Request(PrivacyConfig(1.0), ModelConfig(seed=seed, **model), {}, PerformanceConfig(), "small")
    )


@pytest.mark.parametrize("model", [{}, {"scope": "head"}, {"feature_precision": "float16"}])
def test_shared_boundaries_give_the_features_of_a_single_run(model, monkeypatch):
    store, reads = Boundaries(), []
    original = Boundaries._compute
    monkeypatch.setattr(Boundaries, "_compute", lambda *given: reads.append(1) or original(*given))
    for seed in (0, 1):
        own = learner(seed, **model)
        mine, alone = store.features(own, DATA.train, None, "x"), own.features(DATA.train)
        assert mine.digest == alone.digest
        for name, tensor in alone.features.tensors.items():
            assert torch.equal(mine.features[name], tensor), name
    assert len(reads) == 1  # the second head needs no image


def test_boundaries_of_other_splits_weights_and_fresh_parts_are_kept_apart():
    store = Boundaries()
    first = store.features(learner(), DATA.train, None, "x")
    other = store.features(learner(), DATA.evaluation, None, "x")
    assert len(first.features) != len(other.features)
    for model in ({"weights": "random"}, {"reinitialised_blocks": 2}, {"scope": "head"}):
        for seed in (0, 1):
            own = learner(seed, **model)
            mine = store.features(own, DATA.train, None, "x")
            for name, tensor in own.features(DATA.train).features.tensors.items():
                assert torch.equal(mine.features[name], tensor), (model, name)


def test_large_activations_are_computed_again():
    store = Boundaries(most_bytes=10)
    store.features(learner(), DATA.train, None, "x")
    assert not store._kept


def test_the_faster_layout_is_the_same_model_and_needs_memory():
    slow, fast = learner(data=TEN), learner(data=TEN)
    use_fastest_layout(slow, 20, most_bytes=10)
    use_fastest_layout(fast, 20, most_bytes=memory_share())
    assert (slow.operator.layout, fast.operator.layout) == ("tokens", "classes")
    assert memory_share(2) == memory_share() // 2
    sums = []
    for own in (slow, fast):
        engine = own.engine(
            own.features(TEN.train).features,
            TEN.train.labels,
            loss=CrossEntropy(),
            l2_clip_norm=1.0,
            adjacency="zero-out",
        )
        sums.append(engine.clipped_sum(engine.initial_theta(), torch.arange(20)).value)
    for name, value in sums[0].items():
        assert (sums[1][name] - value).norm() <= 1e-4 * value.norm() + 1e-6, name
