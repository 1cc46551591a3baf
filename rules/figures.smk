"""Figures, each as PDF and PNG with its data as CSV. Each rule draws all figures of one scope."""


rule figure_all:
    input:
        unpack(read_by_figure),
    output:
        **drawn("all"),
    log:
        figure_log("all"),
    benchmark:
        figure_benchmark("all")
    wildcard_constraints:
        figure=one_of(figures.names("all")),
    conda:
        environment()
    resources:
        mem_mb=memory_mb(1500),
        runtime=minutes(10),
    params:
        points=shown_in,
        fits=fits_of,
        settings=settings_of,
        dpi=config.get("figures", {}).get("dpi", 200),
        code=lambda wildcards: code.of_figure(figures.entry(wildcards.figure)["module"]),
    message:
        "Drawing {output.png}"
    script:
        "../workflow_scripts/figures/figure.py"


use rule figure_all as figure_ablation with:
    output:
        **drawn("ablation"),
    log:
        figure_log("ablation"),
    benchmark:
        figure_benchmark("ablation")
    wildcard_constraints:
        figure=one_of(figures.names("ablation")),
        ablation=one_of(config.get("ablations", {})),


use rule figure_all as figure_calibrated with:
    output:
        **drawn("calibrated"),
    log:
        figure_log("calibrated"),
    benchmark:
        figure_benchmark("calibrated")
    wildcard_constraints:
        figure=one_of(figures.names("calibrated")),


use rule figure_all as figure_ratio with:
    output:
        **drawn("ratio"),
    log:
        figure_log("ratio"),
    benchmark:
        figure_benchmark("ratio")
    wildcard_constraints:
        figure=one_of(figures.names("ratio")),


use rule figure_all as figure_variant with:
    output:
        **drawn("variant"),
    log:
        figure_log("variant"),
    benchmark:
        figure_benchmark("variant")
    wildcard_constraints:
        figure=one_of(figures.names("variant")),
