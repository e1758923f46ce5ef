r"""What LaTeX's commands and Unicode's characters stand for: one mark or one name, however it is written."""

_MARKS = r"""
    frac        frac dfrac tfrac cfrac
    binom       binom dbinom tbinom
    sqrt        sqrt √
    overline    overline bar
    vec         vec overrightarrow
    hat         hat widehat
    tilde       tilde widetilde
    *           times cdot ast bullet × · ⋅ ∙
    /           div ÷
    ±           pm
    ∓           mp
    ≠           ne neq
    ≈           approx
    ~           sim thicksim
    ≡           equiv
    <           lt
    >           gt
    ≤           le leq leqslant leqq
    ≥           ge geq geqslant geqq
    ∈           in
    ∉           notin
    ⇒           Rightarrow Longrightarrow implies therefore ⇒ ∴
    ⇔           iff Leftrightarrow Longleftrightarrow
    →           to rightarrow longrightarrow mapsto
    ∪           cup
    ∩           cap
    ∖           setminus backslash
    |           mid vert lvert rvert ∣
    ‖           Vert lVert rVert |
    …           dots ldots cdots dotsc dotsb
    °           degree
    '           prime
    :           colon
    %           %
    \{          lbrace {
    \}          rbrace }
    [           lbrack
    ]           rbrack
    ⟨           langle
    ⟩           rangle
    ⌊           lfloor
    ⌋           rfloor
    ⌈           lceil
    ⌉           rceil
    and         &
    mod         pmod bmod mod
    ∧           land wedge
    ∨           lor vee
"""
_NAMES = r"""
    \alpha      α
    \beta       β
    \gamma      γ
    \delta      δ
    \epsilon    ε varepsilon
    \zeta       ζ
    \eta        η
    \theta      θ vartheta
    \iota       ι
    \kappa      κ
    \lambda     λ
    \mu         μ
    \nu         ν
    \xi         ξ
    \pi         π
    \rho        ρ
    \sigma      σ
    \tau        τ
    \upsilon    υ
    \phi        φ varphi
    \chi        χ
    \psi        ψ
    \omega      ω
    \Gamma      Γ
    \Delta      Δ
    \Theta      Θ
    \Lambda     Λ
    \Xi         Ξ
    \Pi         Π
    \Sigma      Σ
    \Phi        Φ
    \Psi        Ψ
    \Omega      Ω
    \angle      ∠
    \triangle   △
    ∞           infty infinity ∞
    ∅           emptyset varnothing ∅
"""


def _table(text: str) -> dict[str, str]:
    """Of lines `meaning spelling spelling…`: each spelling's meaning."""
    rows = [line.split() for line in text.splitlines()]
    return {spelling: row[0] for row in rows if row for spelling in row[1:]}


MARKS = _table(_MARKS)
NAMES = _table(_NAMES)
NEGATED = {"=": "≠", "∈": "∉"}  # by a \not before them
_TRIGONOMETRIC = frozenset({"sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh"})
INVERSES = {name: f"arc{name}" for name in _TRIGONOMETRIC}  # which \sin^{-1} is
FUNCTIONS = _TRIGONOMETRIC | {*INVERSES.values(), "log", "ln", "lg", "exp", "gcd", "lcm", "max", "min", "det"}
BARE = frozenset({"sqrt", "pi", "theta", "infinity", *FUNCTIONS}) - {"min", "sec"}  # these mean themselves without \

# The two kinds that leave nothing behind but perhaps a blank, and those whose argument stands for itself.
BLANKS = frozenset({*",;: ", "quad", "qquad", "space", "enspace", "thinspace", "hfill"})
NOTHING = frozenset(
    {*"!/()[]-", "left", "right", "middle", "displaystyle", "textstyle", "limits", "nolimits", "rm", "bf", "it"}
    | {"tiny", "scriptsize", "footnotesize", "small", "normalsize", "large", "Large", "LARGE", "huge", "Huge"}
    | {f"{size}{side}" for size in ("big", "Big", "bigg", "Bigg") for side in ("", "l", "r", "m")}
)
FONTS = frozenset(
    {"operatorname", "emph", "underline", "mbox", "hbox", "boldsymbol", "bm", "pmb", "boxed", "fbox", "ensuremath"}
    | {f"text{font}" for font in ("", "bf", "it", "rm", "sf", "tt", "up", "normal")}
    | {f"math{font}" for font in ("bf", "it", "rm", "sf", "tt", "normal")}
)
ENVIRONMENTS = {
    **dict.fromkeys(("matrix", "pmatrix", "bmatrix", "Bmatrix", "smallmatrix", "array"), "matrix"),
    **dict.fromkeys(("cases", "aligned", "align", "align*", "gathered"), "cases"),
}
