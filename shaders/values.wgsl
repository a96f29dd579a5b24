            // Weights x V, of the step whose keys begin with token `there` of shared memory; but for 64 rows the next step's keys too.
            // These lines are in matrix.wgsl twice.
//#for m MATRIX_ROWS
            let weights_$m = load_weights(there * PITCH + WEIGHTS_AT + $mu * 16u);
//#endfor
//#for c MATRIX_COLUMNS
            let v_$c = load_values(there * PITCH + column + $cu * 16u);
//#for m MATRIX_ROWS
            sum_$m_$c = multiply_add(weights_$m, v_$c, sum_$m_$c);
//#endfor
//#endfor
//#if !ROWS_64
            workgroupBarrier();         // this step has been read
//#for n LOADS
            store_key($nu, 0u, next, end, thread, next_$n);
//#endfor
            step = next.step;
            next = located(step_after(next, table_row, end), page, end, kv_head, thread);
            workgroupBarrier();
//#endif
