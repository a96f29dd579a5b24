            // Weights x V, 16 tokens at a time. These lines are in matrix.wgsl twice.
//#for g TOKEN_TILES
//#for m MATRIX_ROWS
            let weights_$g_$m = load_weights($mu * 16u % TOKENS * PITCH + WEIGHTS_AT + $mu * 16u / TOKENS * TOKENS + $gu * 16u);
//#endfor
//#for c MATRIX_COLUMNS
            let v_$g_$c = load_values($gu * 16u * PITCH + column + $cu * 16u);
//#for m MATRIX_ROWS
            sum_$m_$c = multiply_add(weights_$g_$m, v_$g_$c, sum_$m_$c);
//#endfor
//#endfor
//#endfor

            // The next step's keys.
//#if ROWS_64
//#for n LOADS
            next_$n = key_vector($nu, next, end, thread);
//#endfor
//#endif
            workgroupBarrier();         // this step has been read
//#for n LOADS
            store_key($nu, next, end, thread, next_$n);
//#endfor
            step = next.step;
            next = located(step_after(next, table_row, end), page, end, kv_head, thread);
            workgroupBarrier();
