"""Other tools' word on the graphs that `cargo test --features onnx --test onnx` writes.

For every NAME.onnx of the folder: onnx.checker with full shape inference; static shapes of at most four dimensions; the
operators of the README and no others; onnxruntime's `out` and `lse` on the inputs of NAME.safetensors, against the f64
reference and what tract made of the same bytes, within the allowances in that file.

Usage: check.py FOLDER [--tvm N], which `scripts/check-onnx.sh` calls; --tvm also compiles N of them with Apache TVM.
"""

import argparse
import pathlib
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import shape_inference
from safetensors.numpy import load_file

OPERATORS = {
    "Add", "And", "Cast", "Div", "Exp", "Gather", "Less", "Log", "MatMul", "Mul", "ReduceMax", "ReduceSum", "Reshape",
    "Slice", "Sub", "Transpose", "Where",
}  # fmt: skip


def structure(model):
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 13)], model.opset_import
    used = {node.op_type for node in model.graph.node}
    assert used <= OPERATORS, used - OPERATORS
    inferred = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    for value in [*inferred.value_info, *inferred.input, *inferred.output]:
        dims = value.type.tensor_type.shape.dim
        assert len(dims) <= 4 and all(d.HasField("dim_value") and d.dim_value > 0 for d in dims), value
    assert len(inferred.value_info) + len(inferred.output) >= len(inferred.node), "a shape was not inferred"


def worst(got, want, tensors, name):
    """The largest difference as a share of what is allowed."""
    got, want = got.astype(np.float64).ravel(), want.astype(np.float64).ravel()
    each = tensors[f"{name}_abs"]
    out_abs, out_rel, lse_abs, lse_rel = tensors["tolerance"]
    absolute, relative = (out_abs, out_rel) if name == "out" else (lse_abs, lse_rel)
    allowed = absolute + relative * np.abs(want) + (each if each.size else 0.0)
    same = got == want  # infinities among them
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0.0, np.abs(got - want) / np.where(same, 1.0, allowed))
    assert not np.isnan(error).any(), f"{name}: NaN"
    return error.max(initial=0.0)


def tvm_run(model, feeds):
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    module = from_onnx(model, keep_params_in_input=False)
    module = relax.transform.LegalizeOps()(module)
    with tvm.transform.PassContext(opt_level=3):
        built = tvm.compile(module, target="llvm")
    machine = relax.VirtualMachine(built, tvm.cpu())
    array = lambda x: tvm.runtime.tensor(x) if hasattr(tvm.runtime, "tensor") else tvm.nd.array(x)
    return [x.numpy() for x in machine["main"](*[array(feeds[i.name]) for i in model.graph.input])]


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("folder", type=pathlib.Path)
    arguments.add_argument("--tvm", type=int, default=0, help="how many to compile with Apache TVM as well")
    arguments = arguments.parse_args()
    files = sorted(arguments.folder.glob("*.onnx"))
    if len(files) < 40:
        sys.exit(f"{len(files)} graphs in {arguments.folder}: run the tests first")
    # Beside the reference, and beside what tract made: two runtimes may each be off, so their difference may be as large.
    top, compiled = {"reference": 0.0, "tract": 0.0}, 0
    for file in files:
        tensors = load_file(file.with_suffix(".safetensors"))
        model = onnx.load(file)
        structure(model)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        feeds = {i.name: tensors[i.name] for i in session.get_inputs()}
        results = {"onnxruntime": session.run(["out", "lse"], feeds)}
        if compiled < arguments.tvm:
            results["Apache TVM"] = tvm_run(model, feeds)
            compiled += 1
        for who, outputs in results.items():
            for name, got in zip(("out", "lse"), outputs):
                for beside, want in (("reference", tensors[f"ref_{name}"]), ("tract", tensors[name])):
                    share = worst(got, want, tensors, name)
                    top[beside] = max(top[beside], share)
                    if share > 1.0:
                        sys.exit(f"{file.name}: {name} of {who} is off the {beside} by {share:.2f} of the allowance")
    print(f"{len(files)} graphs: checker, operators, static shapes; onnxruntime {onnxruntime.__version__} off the reference "
          f"by {top['reference']:.2f} of the allowance at most, off tract by {top['tract']:.2f}")
    if compiled:
        import tvm

        print(f"{compiled} of them compiled and run by Apache TVM {tvm.__version__} for this CPU")


if __name__ == "__main__":
    main()
