//! The linears of a layer for the rows of a step, with what adapters add.

use oxllama_backend::{Activation, Device, GatedLinear, LinearOutput, NormLinears, Store};

use super::{Delta, Group, ROW_BLOCK, Scratch, Slot, StageAdapters};
use crate::ModelError;

/// The linears of one layer with what a step's adapters add to them.
pub(crate) struct AdaptedLayer<'a, D: Device> {
    pub(super) device: &'a D,
    pub(super) stage: &'a mut StageAdapters<D>,
    /// Among the stage's.
    pub(super) layer: usize,
    pub(super) groups: &'a [Group],
    pub(super) rows: &'a [u32],
}

impl<D: Device> AdaptedLayer<'_, D> {
    /// [`oxllama_backend::LinearOps::announce_reader`], where no adapter reads it as well.
    pub(crate) fn announce_reader(&self, weights: &D::Linear, workspace: &mut D::Workspace) {
        if self.groups.is_empty() {
            self.device.announce_reader(weights, workspace);
        }
    }

    /// [`oxllama_backend::LinearOps::announce_gate`], where no adapter reads gate or up as well.
    pub(crate) fn announce_gate(
        &self,
        activation: Activation,
        weights: &D::Linear,
        workspace: &mut D::Workspace,
    ) {
        if self.groups.is_empty() {
            self.device.announce_gate(activation, weights, workspace);
        }
    }

    /// [`oxllama_backend::LinearOps::norm_linears`] of the linears `slots`.
    pub(crate) fn norm_linears(
        &mut self,
        slots: &[Slot],
        args: NormLinears<'_, D::Linear, D::Buffer>,
        workspace: &mut D::Workspace,
    ) -> Result<(), ModelError> {
        if !self.touches(slots) {
            return Ok(self.device.norm_linears(args, workspace)?);
        }
        // A fused operation does not leave the normed rows, which the adapters need as well.
        let input = match args.norm {
            Some(norm) => {
                let rows = args.rows;
                self.device
                    .norm(norm, args.x, args.normed, rows, workspace)?;
                &*args.normed
            }
            None => args.x,
        };
        for (&slot, output) in slots.iter().zip(args.linears) {
            let output = LinearOutput {
                weights: output.weights,
                out: &mut *output.out,
            };
            self.linear(
                (slot, args.rows),
                input,
                output,
                Store::Overwrite,
                workspace,
            )?;
        }
        Ok(())
    }

    /// [`oxllama_backend::LinearOps::linear`] of the linear `slot` for `rows` rows.
    pub(crate) fn linear(
        &mut self,
        (slot, rows): (Slot, usize),
        x: &D::Buffer,
        output: LinearOutput<'_, D::Linear, D::Buffer>,
        store: Store,
        workspace: &mut D::Workspace,
    ) -> Result<(), ModelError> {
        let plain = LinearOutput {
            weights: output.weights,
            out: &mut *output.out,
        };
        self.device.linear(x, plain, store, rows, workspace)?;
        self.add(slot, x, output.out, store, workspace)
    }

    /// [`oxllama_backend::LinearOps::gated_linear`] of the linear [`Slot::Down`].
    pub(crate) fn gated_linear(
        &mut self,
        args: GatedLinear<'_, D::Linear, D::Buffer>,
        workspace: &mut D::Workspace,
    ) -> Result<(), ModelError> {
        if !self.touches(&[Slot::Down]) {
            return Ok(self.device.gated_linear(args, workspace)?);
        }
        let (in_features, _) = self.device.linear_shape(args.weights);
        let elements = args.rows * in_features;
        self.device
            .gate(args.activation, args.gate, args.up, elements)?;
        let output = LinearOutput {
            weights: args.weights,
            out: args.out,
        };
        let place = (Slot::Down, args.rows);
        self.linear(place, args.gate, output, args.store, workspace)
    }

    /// Whether an adapter of this step changes one of these linears.
    fn touches(&self, slots: &[Slot]) -> bool {
        self.groups.iter().any(|group| {
            let deltas = &self.stage.adapters[group.adapter][self.layer];
            slots.iter().any(|&slot| deltas[slot as usize].is_some())
        })
    }

    /// Adds `scale · B · A · x` to the rows of every adapter that changes this linear.
    fn add(
        &mut self,
        slot: Slot,
        x: &D::Buffer,
        out: &mut D::Buffer,
        store: Store,
        workspace: &mut D::Workspace,
    ) -> Result<(), ModelError> {
        let device = self.device;
        // Without scratch no adapter has a part on this device.
        let Some(Scratch { wide, narrow, .. }) = &mut self.stage.scratch else {
            return Ok(());
        };
        for group in self.groups {
            let deltas = &self.stage.adapters[group.adapter][self.layer];
            let Some(Delta { a, b, scale }) = &deltas[slot as usize] else {
                continue;
            };
            let scale = match store {
                Store::Overwrite => *scale,
                Store::Add { scale: factor } => factor * scale,
            };
            let (in_features, _) = device.linear_shape(a);
            let (_, out_features) = device.linear_shape(b);
            for rows in self.rows[group.rows.clone()].chunks(ROW_BLOCK) {
                let count = rows.len();
                device.gather_rows(x, rows, in_features, wide)?;
                let low = LinearOutput {
                    weights: a,
                    out: narrow,
                };
                device.linear(wide, low, Store::Overwrite, count, workspace)?;
                let high = LinearOutput {
                    weights: b,
                    out: wide,
                };
                device.linear(narrow, high, Store::Overwrite, count, workspace)?;
                device.scatter_add_rows(wide, rows, scale, out_features, out)?;
            }
        }
        Ok(())
    }
}
