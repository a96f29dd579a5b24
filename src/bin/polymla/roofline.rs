//! The roofline picture: rate over arithmetic intensity, our points, the device's two ceilings, recorded peers.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;

use crate::bench::Measured;
use crate::output::short;
use crate::suites::{Ceilings, PEERS, Recorded};

const SIZE: (u32, u32) = (1000, 640);
const OURS: RGBColor = RGBColor(200, 30, 45);
const PEER_COLOURS: [RGBColor; 4] =
    [RGBColor(40, 90, 180), RGBColor(30, 140, 90), RGBColor(150, 90, 170), RGBColor(150, 150, 150)];

/// Draws `rows` into `path` as SVG.
pub fn draw(
    path: &Path,
    device: &str,
    ceilings: Option<Ceilings>,
    rows: &[Measured],
    peers: Option<&Recorded>,
) -> Result<(), Box<dyn Error>> {
    // Logarithmic axes have no place for a row without work.
    let rows: Vec<&Measured> = rows.iter().filter(|m| m.flop > 0.0).collect();
    if rows.is_empty() {
        return Err("no row has any work, so there is nothing to draw".into());
    }
    let intensity = |m: &Measured| m.flop / m.bytes;
    let rate = |m: &Measured, us: f64| m.flop / us / 1e6;
    let mut points: Vec<(f64, f64)> = rows.iter().map(|m| (intensity(m), rate(m, m.us))).collect();
    let peer_points = |name: &str| -> Vec<(f64, f64)> {
        let us = |m: &Measured| peers.and_then(|p| p.peer_us(&m.shape, name));
        rows.iter().filter_map(|m| us(m).map(|us| (intensity(m), rate(m, us)))).collect()
    };
    points.extend(PEERS.iter().flat_map(|name| peer_points(name)));
    let span = |get: fn(&(f64, f64)) -> f64| {
        points.iter().map(get).fold((f64::MAX, f64::MIN), |(lo, hi), x| (lo.min(x), hi.max(x)))
    };
    let (x, y) = (span(|p| p.0), span(|p| p.1));
    let top = ceilings.map_or(y.1, |c| c.tflops.max(y.1));
    let (x, y) = (x.0 * 0.7..x.1 * 1.6, y.0 * 0.6..top * 1.5);

    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(format!("MLA decoding, {device}"), ("sans-serif", 22))
        .margin(16)
        .x_label_area_size(46)
        .y_label_area_size(64)
        .build_cartesian_2d(x.clone().log_scale(), y.clone().log_scale())?;
    chart
        .configure_mesh()
        .x_desc("arithmetic intensity, FLOP / byte (compulsory traffic)")
        .y_desc("TFLOP/s")
        .light_line_style(BLACK.mix(0.04))
        .bold_line_style(BLACK.mix(0.10))
        .label_style(("sans-serif", 14))
        .x_label_formatter(&|v| format!("{v:.0}"))
        .y_label_formatter(&|v| short(*v))
        .draw()?;
    if let Some(c) = ceilings {
        let steps = 200;
        let at = |i: i32| x.start * (x.end / x.start).powf(f64::from(i) / f64::from(steps));
        let roof = (0..=steps).map(at).map(|x| (x, (x * c.read_gbps / 1e3).min(c.tflops)));
        let label = format!("ceilings: {:.0} GB/s, {} TFLOP/s", c.read_gbps, short(c.tflops));
        chart
            .draw_series(LineSeries::new(roof.filter(|(_, r)| *r >= y.start), BLACK.stroke_width(2)))?
            .label(label)
            .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], BLACK.stroke_width(2)));
    }
    for (name, colour) in PEERS.iter().zip(PEER_COLOURS) {
        let list = peer_points(name);
        if !list.is_empty() {
            chart
                .draw_series(list.into_iter().map(|p| Cross::new(p, 4, colour.stroke_width(2))))?
                .label(format!("{name} (recorded)"))
                .legend(move |(x, y)| Cross::new((x + 9, y), 4, colour.stroke_width(2)));
        }
    }
    chart
        .draw_series(rows.iter().map(|m| Circle::new((intensity(m), rate(m, m.us)), 5, OURS.filled())))?
        .label("polymla")
        .legend(|(x, y)| Circle::new((x + 9, y), 5, OURS.filled()));
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE)
        .border_style(BLACK.mix(0.3))
        .label_font(("sans-serif", 14))
        .draw()?;
    root.present()?;
    Ok(())
}
