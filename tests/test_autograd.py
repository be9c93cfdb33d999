import torch

from fewshot.autograd import autograd_graph, is_double_backward


def test_every_node_of_the_graph_is_visited():
    x = torch.ones(2, requires_grad=True)
    nodes, edges = autograd_graph((x * x).sum() + x[0])
    names = [node.name().rstrip("0") for node in nodes]
    assert sorted(names) == sorted(
        ["AddBackward", "SumBackward", "SelectBackward", "MulBackward", "torch::autograd::AccumulateGrad"]
    )
    assert len(edges) == 6  # x is used three times
    assert is_double_backward("ConvolutionBackwardBackward0") and not is_double_backward("ConvolutionBackward0")
    assert is_double_backward("_BatchNormBackwardBackward")
