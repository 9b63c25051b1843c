"""The methods of training by name. A new method is one line here and a `MethodSpec` where the line says."""

METHODS: dict[str, str] = {
    "opd": "opd_fast.config.methods.opd:SPEC",
    "grpo": "opd_fast.config.methods.grpo:SPEC",
    "nft": "opd_fast.config.methods.nft:SPEC",
    "sft": "opd_fast.config.methods.sft:SPEC",
}
"""`train.method` to `module:name` of its `opd_fast.config.methods.spec.MethodSpec`. The specs of these four import no
torch, so that configurations are read and refused without it."""
