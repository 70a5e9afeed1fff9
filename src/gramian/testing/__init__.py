"""The contract of ``gramian.ops`` as checks that anyone can run over a structure of their own.

Every check is a plain function that raises ``AssertionError`` with what it found; none needs a test framework::

    from gramian.testing import check_operator, check_structure

    check_operator(MyStructure.init((48, 32), size=4))
    check_structure(MyStructure)

``operator_checks`` and ``structure_checks`` list them one by one, for a test of its own each::

    @pytest.mark.parametrize("check", operator_checks, ids=lambda check: check.__name__)
    def test_contract(check):
        check(MyStructure.init((48, 32), size=4))
"""

from gramian.testing.contract import (
    KEEPS,
    SHAPES,
    check_compile,
    check_configuration,
    check_copies,
    check_counts,
    check_dtypes,
    check_fit,
    check_gradients,
    check_init,
    check_layer,
    check_members,
    check_operator,
    check_product,
    check_replace,
    check_runtime,
    check_sizes,
    check_structure,
    check_transpose,
    check_vmap,
    check_wrong_input,
    operator_checks,
    structure_checks,
)

__all__ = [
    "KEEPS",
    "SHAPES",
    "check_compile",
    "check_configuration",
    "check_copies",
    "check_counts",
    "check_dtypes",
    "check_fit",
    "check_gradients",
    "check_init",
    "check_layer",
    "check_members",
    "check_operator",
    "check_product",
    "check_replace",
    "check_runtime",
    "check_sizes",
    "check_structure",
    "check_transpose",
    "check_vmap",
    "check_wrong_input",
    "operator_checks",
    "structure_checks",
]
