            // Weights x V, of the step whose keys begin with token `there` of shared memory. These lines are in matrix.wgsl twice.
//#for m MATRIX_ROWS
            let weights_$m = load_weights(there * PITCH + WEIGHTS_AT + $mu * 16u);
//#endfor
//#for c MATRIX_COLUMNS
            let v_$c = load_values(there * PITCH + column + $cu * 16u);
//#for m MATRIX_ROWS
            sum_$m_$c = multiply_add(weights_$m, v_$c, sum_$m_$c);
//#endfor
//#endfor
