import pytest
import torch

from fewshot.distances import ScaledCosine, cosine, l2
from fewshot.errors import FewShotError

ONES = torch.ones(2, 3), torch.ones(4, 3)


def loop_l2(query, point):
    return sum((a - b) ** 2 for a, b in zip(query, point, strict=True))


def loop_cosine(query, point):
    norms = [sum(a * a for a in vector) ** 0.5 for vector in (query, point)]
    return 1 - sum(a * b for a, b in zip(query, point, strict=True)) / (norms[0] * norms[1])


@pytest.mark.parametrize(("distance", "loop"), [(l2, loop_l2), (cosine, loop_cosine)])
def test_values_and_gradients_match_a_float64_loop(distance, loop):
    torch.manual_seed(0)
    queries = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    points = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    looped = torch.stack([torch.stack([loop(query, point) for point in points]) for query in queries])
    computed = distance(queries, points)
    torch.testing.assert_close(computed, looped, rtol=1e-12, atol=1e-12)
    weights = torch.randn(4, 5, dtype=torch.float64)
    expected = torch.autograd.grad((weights * looped).sum(), (queries, points))
    gradients = torch.autograd.grad((weights * computed).sum(), (queries, points))
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-10)


def test_by_hand():
    queries, points = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0], [-4.0, 3.0], [-6.0, -8.0]])
    assert l2(queries, points).tolist() == [[25, 0, 50, 225]]
    torch.testing.assert_close(cosine(queries, points), torch.tensor([[1.0, 0.0, 1.0, 2.0]]))


@pytest.mark.parametrize("distance", [l2, cosine])
def test_zero_vectors_have_finite_distances_and_gradients(distance):
    queries, points = torch.zeros(2, 3, requires_grad=True), torch.zeros(4, 3, requires_grad=True)
    computed = distance(queries, points)
    computed.sum().backward()
    for tensor in (computed, queries.grad, points.grad):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("distance", [l2, cosine])
def test_half_precision_does_not_lose_small_distances(distance):
    queries = torch.full((1, 64), 10.0)
    points = torch.stack([queries[0], queries[0] + torch.linspace(-0.5, 0.5, 64)])
    with torch.autocast("cpu", torch.bfloat16):
        computed = distance(queries.bfloat16(), points.bfloat16())
    assert computed.dtype == torch.float32
    # Half precision may round the embeddings, but nothing after them.
    rounded = distance(queries.bfloat16().float(), points.bfloat16().float())
    torch.testing.assert_close(computed, rounded, rtol=0, atol=0)
    assert computed[0, 1] > 100 * computed[0, 0].abs()


def test_scaled_cosine_is_cosine_times_its_factor_and_only_a_learned_factor_has_a_gradient():
    torch.manual_seed(0)
    queries, points = torch.randn(4, 3), torch.randn(5, 3)
    for learn in (False, True):
        distance = ScaledCosine(10.0, learn)
        torch.testing.assert_close(distance(queries, points), 10 * cosine(queries, points))
        if learn:
            distance(queries, points).sum().backward()
            assert distance.log_scale.grad is not None and distance.log_scale.grad.abs() > 1
        else:
            assert not distance(queries, points).requires_grad


def test_scaled_l2_is_l2_times_its_factor():
    torch.manual_seed(0)
    queries, points = torch.randn(4, 3), torch.randn(5, 3)
    torch.testing.assert_close(l2(queries, points, scale=0.025), 0.025 * l2(queries, points))


@pytest.mark.parametrize("scale", [0, -1.0])
@pytest.mark.parametrize("make", [lambda scale: ScaledCosine(scale, learn=False), lambda scale: l2(*ONES, scale=scale)])
def test_a_factor_must_be_positive(make, scale):
    with pytest.raises(FewShotError, match=rf"distance\.scale={scale} must be positive"):
        make(scale)
