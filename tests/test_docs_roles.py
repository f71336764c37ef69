"""Docstrings in Markdown, as the site and the generated tables show them."""

import inspect

from docs.tools.roles import markdown


def test_formulas_stand_between_dollars():
    doc = inspect.cleandoc(r"""
        Half of it.

        .. math:: \tfrac12 x

        Where :math:`x` is

        .. math::
            x = a
                + b

        Args:
            a: as :math:`\alpha`, or

                .. math:: c

            b: ``None``.
    """)
    assert markdown(doc) == inspect.cleandoc(r"""
        Half of it.

        $$
        \tfrac12 x
        $$

        Where $x$ is

        $$
        x = a
        + b
        $$

        Args:
            a: as $\alpha$, or

                $$
                c
                $$

            b: `None`.
    """)


def test_roles_are_code_or_what_a_link_makes_of_them():
    text = "See :func:`mmd2`, :class:`~torch.nn.Module`, :meth:`hf_ft.FTTrainer.train` and :data:`scipy.stats.norm`."
    assert markdown(text) == "See `mmd2`, `Module`, `train` and `scipy.stats.norm`."
    linked = markdown("the :class:`~hf_ft.core.view.View`", lambda label, target: f"[{label}][{target}]")
    assert linked == "the [View][hf_ft.core.view.View]"
