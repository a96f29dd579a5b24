//! ONNX's file format, as far as a graph without control flow needs it: protocol buffers written by hand.
//!
//! Field numbers are those of `onnx.proto` (IR version 7). Written rather than generated: the whole schema we use is
//! this page, and a writer that shares no code with the runtime is checked by it.

/// Element types, by their numbers in `TensorProto.DataType`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Elem {
    /// binary32.
    F32 = 1,
    /// 32-bit integers.
    I32 = 6,
    /// 64-bit integers; only in the shapes and axes that operators take.
    I64 = 7,
    /// binary16.
    F16 = 10,
}

/// An attribute of a node.
#[derive(Debug, Clone, PartialEq)]
pub enum Attribute {
    /// An integer.
    Int(i64),
    /// A list of integers.
    Ints(Vec<i64>),
}

/// A node: an operator of the default domain with one output.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// The operator.
    pub op: &'static str,
    /// What it reads.
    pub inputs: Vec<String>,
    /// What it makes, which is its name too.
    pub output: String,
    /// Its attributes.
    pub attributes: Vec<(&'static str, Attribute)>,
}

/// A tensor by name, type and shape.
#[derive(Debug, Clone, PartialEq)]
pub struct Value {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub elem: Elem,
    /// Its shape.
    pub shape: Vec<usize>,
}

/// A constant.
#[derive(Debug, Clone, PartialEq)]
pub struct Constant {
    /// Name, type and shape.
    pub value: Value,
    /// Its elements, little-endian.
    pub bytes: Vec<u8>,
}

/// A message under construction.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut x: u64) {
        while x >= 0x80 {
            self.0.push(x as u8 | 0x80);
            x >>= 7;
        }
        self.0.push(x as u8);
    }

    /// An integer field; negative ones take ten bytes, as the format says.
    fn int(&mut self, field: u64, x: i64) {
        self.varint(field << 3);
        self.varint(x as u64);
    }

    fn bytes(&mut self, field: u64, bytes: &[u8]) {
        self.varint(field << 3 | 2);
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    fn text(&mut self, field: u64, text: &str) {
        self.bytes(field, text.as_bytes());
    }

    fn message(&mut self, field: u64, fill: impl FnOnce(&mut Message)) {
        let mut inner = Message::default();
        fill(&mut inner);
        self.bytes(field, &inner.0);
    }
}

impl Value {
    /// As a `ValueInfoProto`.
    fn write(&self, to: &mut Message) {
        to.text(1, &self.name);
        to.message(2, |kind| {
            kind.message(1, |tensor| {
                tensor.int(1, self.elem as i64);
                tensor.message(2, |shape| {
                    self.shape.iter().for_each(|n| shape.message(1, |dim| dim.int(1, *n as i64)));
                });
            });
        });
    }
}

impl Constant {
    /// As a `TensorProto`.
    fn write(&self, to: &mut Message) {
        self.value.shape.iter().for_each(|n| to.int(1, *n as i64));
        to.int(2, self.value.elem as i64);
        to.text(8, &self.value.name);
        to.bytes(9, &self.bytes);
    }
}

impl Node {
    /// As a `NodeProto`.
    fn write(&self, to: &mut Message) {
        self.inputs.iter().for_each(|name| to.text(1, name));
        to.text(2, &self.output);
        to.text(3, &self.output);
        to.text(4, self.op);
        for (name, value) in &self.attributes {
            to.message(5, |attribute| {
                attribute.text(1, name);
                match value {
                    Attribute::Int(i) => {
                        attribute.int(3, *i);
                        attribute.int(20, 2);
                    }
                    Attribute::Ints(all) => {
                        all.iter().for_each(|i| attribute.int(8, *i));
                        attribute.int(20, 7);
                    }
                }
            });
        }
    }
}

/// A whole model.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// What it is, in words.
    pub doc: String,
    /// Facts for programs: keys and values.
    pub metadata: Vec<(&'static str, String)>,
    /// What the caller gives, in order.
    pub inputs: Vec<Value>,
    /// What comes out, in order.
    pub outputs: Vec<Value>,
    /// Constants.
    pub constants: Vec<Constant>,
    /// Operators, each after those whose outputs it reads.
    pub nodes: Vec<Node>,
}

/// Version of the file format: the one that came with opset 13.
const IR_VERSION: i64 = 7;

/// The operator set: the first in which every operator used here takes the types we give it.
pub const OPSET: i64 = 13;

impl Model {
    /// The bytes of an `.onnx` file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut model = Message::default();
        model.int(1, IR_VERSION);
        model.text(2, "polymla");
        model.text(3, env!("CARGO_PKG_VERSION"));
        model.text(6, &self.doc);
        model.message(7, |graph| {
            self.nodes.iter().for_each(|node| graph.message(1, |m| node.write(m)));
            graph.text(2, "mla_decode");
            self.constants.iter().for_each(|constant| graph.message(5, |m| constant.write(m)));
            self.inputs.iter().for_each(|value| graph.message(11, |m| value.write(m)));
            self.outputs.iter().for_each(|value| graph.message(12, |m| value.write(m)));
        });
        model.message(8, |opset| {
            opset.text(1, "");
            opset.int(2, OPSET);
        });
        for (key, value) in &self.metadata {
            model.message(14, |entry| {
                entry.text(1, key);
                entry.text(2, value);
            });
        }
        model.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against bytes worked out by hand from the protocol buffers encoding.
    #[test]
    fn varints_and_lengths() {
        let mut m = Message::default();
        m.int(1, 300);
        m.int(2, -1);
        m.text(8, "ab");
        let minus_one = [0x10, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
        assert_eq!(m.0, [&[0x08, 0xac, 0x02][..], &minus_one, &[0x42, 2, b'a', b'b']].concat());
        let mut m = Message::default();
        m.bytes(20, &[7; 200]);
        assert_eq!(m.0[..4], [0xa2, 0x01, 0xc8, 0x01]);
    }
}
