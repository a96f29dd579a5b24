# What the device-*.sh scripts share; they source it.

# test_binary TARGET FEATURES: builds a test target and prints where it is; there may be older ones beside it.
test_binary() {
    cargo test --no-run --features "$2" --test "$1" --message-format=json | python3 -c 'import json,sys
for line in sys.stdin:
    m = json.loads(line)
    if m.get("executable") and m["target"]["name"] == sys.argv[1]:
        print(m["executable"])' "$1"
}

# run_steps STEP...: each is a function step_NAME, whose words go to $out/NAME.log and whose last ones are shown (LINES_SHOWN).
# Every step runs, whatever became of those before; the last line counts them.
run_steps() {
    local passed=0 failed=0 step start status
    for step in "$@"; do
        echo "== $step"
        start=$SECONDS
        # In a subshell with the shell's own checks on: `if` would switch them off.
        set +e
        (set -e && "step_$step") >"$out/$step.log" 2>&1
        status=$?
        set -e
        tail -n "${LINES_SHOWN:-50}" "$out/$step.log"
        if [ $status -eq 0 ]; then
            passed=$((passed + 1))
            echo "-- $step passed in $((SECONDS - start)) s"
        else
            failed=$((failed + 1))
            echo "-- $step FAILED ($status) in $((SECONDS - start)) s"
        fi
    done
    echo "$passed steps passed, $failed failed"
    [ "$failed" -eq 0 ]
}
