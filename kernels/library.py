"""The `qexp` operator library: it connects schema, reference, fake and gradient of each operator.

The reference is registered for every backend (`CompositeExplicitAutograd`). A compiled implementation registers
itself for `CPU` or `CUDA` when its library is loaded and takes precedence there; nothing else changes.
"""

from collections.abc import Callable

import torch

from .errors import KernelError

LIBRARY = torch.library.Library("qexp", "FRAGMENT")
REFERENCES: dict[str, Callable] = {}


def define(schema: str, reference: Callable, fake: Callable) -> None:
    """Registers an operator `qexp::<name>` with its PyTorch implementation and its shape function.

    Args:
        schema: The schema in the form of `torch.library`, without the namespace.
        reference: The default implementation, in plain PyTorch.
        fake: Returns empty tensors of the right shape, dtype and strides.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qexp::{name}", fake, lib=LIBRARY)
    REFERENCES[name] = reference


def constant(name: str) -> None:
    """Declares that `qexp::<name>` is not differentiable: no gradient flows through its results."""

    def setup_context(ctx, inputs, output) -> None:
        ctx.count = len(inputs)
        ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))

    def backward(ctx, *grads):
        return (None,) * ctx.count

    differentiable(name, setup_context, backward)


def first_order_only(name: str) -> Callable:
    """Declares that `qexp::<name>`, itself a gradient, cannot be differentiated again (an error, not a wrong number).

    Returns:
        The fastest way to call the operator, like `differentiable`.
    """

    def backward(ctx, *grads):
        raise KernelError(f"{name}: second derivatives of a quantizer are not defined; use create_graph=False")

    return differentiable(name, lambda ctx, inputs, output: None, backward)


def differentiable(name: str, setup_context: Callable, backward: Callable, *, twice: bool = False) -> Callable:
    """Registers the gradient of `qexp::<name>` (for every implementation) and returns the fastest way to call the operator.

    torch's own path through a registered gradient enters Python twice and takes 20 microseconds more; a training step calls
    a quantizer a hundred times. The registered gradient is used where graphs are traced and where functions are transformed.

    Args:
        name: The operator.
        setup_context, backward: As `torch.library.register_autograd` takes them.
        twice: The way returns the operator's first result again at the end, and `backward` gets the gradient of that one last.
    """
    torch.library.register_autograd(f"qexp::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    op = getattr(torch.ops.qexp, name).default
    is_compiling, grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
    transforms = torch._C._are_functorch_transforms_active
    call = op._op  # the operator without the checks that tracing needs
    below = torch._C._AutoDispatchBelowAutograd

    def forward(ctx, *arguments):
        with below():
            output = call(*arguments)
        setup_context(ctx, arguments, output)
        return again(output, output[0].detach()) if twice else output

    function = type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )

    apply = super(torch.autograd.Function, function).apply  # skips the part that only function transforms need
    function._backward_cls.apply = (
        backward  # the engine calls it by this name; torch's own looks the same function up each time
    )

    def again(output, first):
        return (*output, first)

    tensors = [i for i, a in enumerate(op._schema.arguments) if "Tensor" in str(a.type)]

    def run(*arguments):
        if is_compiling() or transforms():
            return again(output := op(*arguments), output[0]) if twice else op(*arguments)
        if grad_enabled():
            for i in tensors:
                argument = arguments[i]
                if argument is not None and argument.requires_grad:
                    return apply(*arguments)
        with below():
            return again(output := call(*arguments), output[0]) if twice else call(*arguments)

    return run
